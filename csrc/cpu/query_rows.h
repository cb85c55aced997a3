// The rows of one piece of work: which query heads and positions they are, and their vectors as
// panels for TileOps::score.
#pragma once

#include "condensate/kv_view.h"
#include "condensate/tile.h"
#include "cpu/parallel.h"
#include "cpu/tile_ops.h"
#include "host/number.h"

namespace condensate::cpu {

inline const void* element(const ConstTensor4& tensor, DType dtype, int64_t batch, int64_t head,
                           int64_t index) {
    return static_cast<const char*>(tensor.data) +
           tensor.offset(batch, head, index) * dtype_bytes(dtype);
}

// Up to kMaxRows rows that share one KV head.
struct QueryRows {
    explicit QueryRows(Arena& arena, int64_t dim)
        : head(arena.take<int64_t>(kMaxRows)),
          query(arena.take<int64_t>(kMaxRows)),
          position(arena.take<int64_t>(kMaxRows)),
          panels(arena.take<float>(kMaxRows * dim)),
          line(arena.take<float>(dim)) {}

    int64_t* head;      // query head
    int64_t* query;     // index in the query sequence
    int64_t* position;  // absolute
    float* panels;      // [panel][dim][kPanelRows]
    float* line;        // one row on its way into a panel
    int count = 0;

    int panel_count() const { return (count + kPanelRows - 1) / kPanelRows; }

    void clear() { count = 0; }
    void add(const Sequence& sequence, int64_t h, int64_t i) {
        head[count] = h;
        query[count] = i;
        position[count] = sequence.position_of(i);
        ++count;
    }

    int64_t first_position() const {
        int64_t first = position[0];
        for (int row = 1; row < count; ++row) first = min_i64(first, position[row]);
        return first;
    }
    int64_t last_position() const {
        int64_t last = position[0];
        for (int row = 1; row < count; ++row) last = max_i64(last, position[row]);
        return last;
    }

    // Copies `line` into row `row`'s place.
    void put_line(int row, int64_t dim) {
        float* target = panels + row / kPanelRows * dim * kPanelRows + row % kPanelRows;
        for (int64_t d = 0; d < dim; ++d) target[d * kPanelRows] = line[d];
    }
    // Fills the panels from the query tensor; rows past `count` of the last panel become 0.
    void load(const TileOps& ops, const Problem& p, const ConstTensor4& tensor, int64_t batch) {
        const int dim = static_cast<int>(p.head_dim);
        for (int row = 0; row < panel_count() * kPanelRows; ++row) {
            int rows = row < count ? 1 : 0;  // a row of zeros otherwise
            const void* source =
                rows > 0 ? element(tensor, p.dtype, batch, head[row], query[row]) : nullptr;
            if (rows > 0)
                ops.load_rows(p.dtype, source, 0, 1, dim, line, dim);
            else
                for (int d = 0; d < dim; ++d) line[d] = 0.0f;
            put_line(row, dim);
        }
    }
};

// The keys or values of a KV head.
inline KvView view_of(const ConstTensor4& tensor, const Problem& p, int64_t batch,
                      int64_t kv_head) {
    return KvView::of(tensor, static_cast<int>(dtype_bytes(p.dtype)), batch, kv_head);
}

// Loads rows begin.. of `kv_len` as a full tile of kTileKeys rows: those past the last are 0.
// Returns whether everything is finite.
inline bool load_tile(const TileOps& ops, const Problem& p, const KvView& view, int64_t kv_len,
                      int64_t begin, int ld, float* target) {
    const int rows = static_cast<int>(min_i64(kTileKeys, kv_len - begin));
    const void* source = view.row(begin, static_cast<int>(dtype_bytes(p.dtype)));
    const bool finite =
        ops.load_rows(p.dtype, source, view.stride, rows, static_cast<int>(p.head_dim), target, ld);
    for (int64_t n = int64_t{rows} * ld; n < int64_t{kTileKeys} * ld; ++n) target[n] = 0.0f;
    return finite;
}

}  // namespace condensate::cpu
