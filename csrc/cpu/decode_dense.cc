// Dense attention: chunks of keys in parallel for all rows of a KV head, then one merge a row.
#include <cmath>
#include <limits>

#include "cpu/decode.h"
#include "cpu/parallel.h"

namespace condensate::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kChunkKeys = 2048;  // the same whatever the batch, so that results are too

struct DenseScratch {
    QueryTile queries;
    float* row;     // [dim]
    float* keys;    // [kTileKeys][dim], then the values
    float* scores;  // [kTileKeys][kScoreStride]
    float* out;     // [kMaxRows][dim]
    RowMask* mask;
    SoftmaxState* state;
    int64_t* visible;  // [kMaxRows]
};

// What chunks leave for the merge.
struct Partials {
    int64_t chunks, rows, dim;
    std::unique_ptr<float[]> max, sum;  // [B, Hkv, chunks, rows]
    std::unique_ptr<float[]> out;       // [B, Hkv, chunks, rows, dim]
    int64_t at(int64_t b_kv, int64_t chunk, int64_t row) const {
        return (b_kv * chunks + chunk) * rows + row;
    }
};

struct DenseItem {
    int64_t b, kv, first_row, rows, chunk;
};

void load_queries(const DecodeCall& call, const DenseItem& item, DenseScratch& s) {
    s.queries.clear(item.rows);
    for (int r = 0; r < item.rows; ++r) {
        const int64_t row = item.first_row + r;
        call.load_query(item.b, item.kv, row / call.group, static_cast<int>(row % call.group),
                        s.row);
        s.queries.put(s.row, r);
    }
}

// Keys that each row attends, [0, visible).
void set_visible(const DecodeCall& call, const DenseItem& item, DenseScratch& s) {
    for (int r = 0; r < kMaxRows; ++r) {
        const int64_t i = (item.first_row + r) / call.group;
        s.visible[r] = r < item.rows && call.is_dense(item.b, i) ? call.span(item.b, i).visible : 0;
        s.mask->free_end[r] = kTileKeys;
        s.mask->window_begin[r] = s.mask->window_end[r] = s.mask->tie_end[r] = 0;
        s.mask->threshold[r] = std::numeric_limits<float>::infinity();
    }
}

void set_mask(const DenseItem& item, int64_t first, DenseScratch& s) {
    const int64_t rows = ceil_div(item.rows, kPanelRows) * kPanelRows;
    for (int r = 0; r < rows; ++r)
        s.mask->visible_end[r] =
            static_cast<int32_t>(max_i64(min_i64(s.visible[r] - first, kTileKeys), 0));
}

// Values that are not finite must not reach rows that do not attend them, whose weight is 0.
void accumulate_attended(const DecodeCall& call, const DenseItem& item, const DenseScratch& s) {
    for (int r = 0; r < item.rows; ++r) {
        float* out = s.out + int64_t{r} * call.dim;
        for (int d = 0; d < call.dim; ++d) out[d] *= s.state->rescale[r];
        for (int n = 0; n < s.mask->visible_end[r]; ++n)
            for (int d = 0; d < call.dim; ++d)
                out[d] += s.scores[n * kScoreStride + r] * s.keys[int64_t{n} * call.dim + d];
    }
}

void attend_tile(const DecodeCall& call, const DenseItem& item, int64_t first, int count,
                 DenseScratch& s) {
    const SequenceRows sequence = call.rows_of(item.b, item.kv);
    const int panels = static_cast<int>(ceil_div(item.rows, kPanelRows));
    int32_t keys[kTileKeys];
    bool there[kTileKeys];
    for (int n = 0; n < count; ++n) keys[n] = static_cast<int32_t>(first) + n;
    sequence.load_keys(call.ops, keys, count, s.keys, there);
    s.queries.score(call.ops, s.keys, item.rows, call.p.scale * sequence.key_scale(), s.scores);
    const int columns = panels * kPanelRows;
    if (call.p.softcap > 0)
        for (int n = 0; n < count; ++n)
            for (int r = 0; r < columns; ++r)
                s.scores[n * kScoreStride + r] =
                    capped(s.scores[n * kScoreStride + r], call.p.softcap);
    set_mask(item, first, s);
    call.ops.mask(*s.mask, panels, s.scores);
    for (int n = 0; n < count; ++n)
        if (!there[n]) std::fill_n(s.scores + n * kScoreStride, columns, kMinusInfinity);
    call.ops.softmax(panels, s.scores, s.state);
    const bool finite = sequence.load_values(call.ops, keys, count, s.keys, there);
    std::fill(s.keys + int64_t{count} * call.dim, s.keys + int64_t{kTileKeys} * call.dim, 0.0f);
    if (finite)
        call.ops.accumulate(s.scores, s.keys, call.dim, accumulated_rows(item.rows),
                            s.state->rescale, s.out);
    else
        accumulate_attended(call, item, s);
}

void attend_chunk(const DecodeCall& call, const DenseItem& item, const Partials& partials,
                  DenseScratch& s) {
    load_queries(call, item, s);
    set_visible(call, item, s);
    std::fill(s.out, s.out + int64_t{kMaxRows} * call.dim, 0.0f);
    std::fill(s.state->max, s.state->max + kMaxRows, kMinusInfinity);
    std::fill(s.state->sum, s.state->sum + kMaxRows, 0.0f);
    std::fill(s.state->sum_error, s.state->sum_error + kMaxRows, 0.0f);
    const int64_t last = (item.first_row + item.rows - 1) / call.group;
    const int64_t begin = item.chunk * kChunkKeys;
    const int64_t end = min_i64(begin + kChunkKeys, call.span(item.b, last).visible);
    for (int64_t first = begin; first < end; first += kTileKeys)
        attend_tile(call, item, first, static_cast<int>(min_i64(kTileKeys, end - first)), s);
    const int64_t b_kv = item.b * call.p.kv_heads + item.kv;
    for (int r = 0; r < item.rows; ++r) {
        const int64_t at = partials.at(b_kv, item.chunk, item.first_row + r);
        partials.max[at] = s.state->max[r];
        partials.sum[at] = s.state->sum[r] - s.state->sum_error[r];
        const float* out = s.out + int64_t{r} * call.dim;
        std::copy(out, out + call.dim, partials.out.get() + at * call.dim);
    }
}

void merge_row(const DecodeCall& call, const Partials& partials, int64_t b, int64_t kv, int64_t i,
               int g, float* values) {
    const int64_t b_kv = b * call.p.kv_heads + kv, row = i * call.group + g;
    const int64_t chunks = ceil_div(call.span(b, i).visible, kChunkKeys);
    RowSum total{kMinusInfinity, 0};
    for (int64_t c = 0; c < chunks; ++c)
        total.max = std::max(total.max, partials.max[partials.at(b_kv, c, row)]);
    std::fill(values, values + call.dim, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = partials.at(b_kv, c, row);
        if (partials.max[at] == kMinusInfinity && partials.sum[at] == 0) continue;
        const float factor = std::exp(partials.max[at] - total.max);
        total.sum += static_cast<double>(partials.sum[at]) * factor;
        const float* out = partials.out.get() + at * call.dim;
        for (int d = 0; d < call.dim; ++d) values[d] += out[d] * factor;
    }
    finish_row(call, b, kv, i, g, total, values);
    set_estimate(call, call.row(b, kv, i, g), 0.0f);
}

}  // namespace

Status attend_densely(DecodeCall& call) {
    const DecodeParams& p = call.p;
    Partials partials;
    partials.rows = p.query_len * call.group;
    partials.dim = call.dim;
    partials.chunks = ceil_div(call.longest, kChunkKeys);
    if (p.mode == DecodeMode::kSelectAndAttend)  // longer ones are not dense
        partials.chunks = min_i64(
            partials.chunks,
            ceil_div(p.shortlist + p.window + p.anchors + call.pool + p.query_len, kChunkKeys));
    const auto count = static_cast<size_t>(p.batch * p.kv_heads * partials.chunks * partials.rows);
    partials.max.reset(new float[count]);
    partials.sum.reset(new float[count]);
    partials.out.reset(new float[count * static_cast<size_t>(call.dim)]);
    const int64_t row_tiles = ceil_div(partials.rows, kMaxRows);
    auto layout = [&](Arena& arena) {
        return DenseScratch{{arena.take<float>(int64_t{kMaxRows} * call.dim), call.group, call.dim},
                            arena.take<float>(call.dim),
                            arena.take<float>(int64_t{kTileKeys} * call.dim),
                            arena.take<float>(int64_t{kTileKeys} * kScoreStride),
                            arena.take<float>(int64_t{kMaxRows} * call.dim),
                            arena.take<RowMask>(1),
                            arena.take<SoftmaxState>(1),
                            arena.take<int64_t>(kMaxRows)};
    };
    const Status status =
        for_each_item(call.executor, p.batch * p.kv_heads * row_tiles * partials.chunks, layout,
                      [&](int64_t n, DenseScratch& scratch) {
                          DenseItem item;
                          item.chunk = n % partials.chunks;
                          n /= partials.chunks;
                          item.first_row = n % row_tiles * kMaxRows;
                          item.rows = min_i64(partials.rows - item.first_row, kMaxRows);
                          n /= row_tiles;
                          item.kv = n % p.kv_heads;
                          item.b = n / p.kv_heads;
                          // Of a sequence's queries the first are dense, if any.
                          if (call.is_dense(item.b, item.first_row / call.group))
                              attend_chunk(call, item, partials, scratch);
                      });
    if (!status.ok()) return status;
    auto values = [&](Arena& arena) { return arena.take<float>(call.dim); };
    return for_each_item(call.executor, p.batch * p.kv_heads * partials.rows, values,
                         [&](int64_t n, float* row) {
                             const int64_t r = n % partials.rows, b_kv = n / partials.rows;
                             const int64_t b = b_kv / p.kv_heads, i = r / call.group;
                             if (call.is_dense(b, i))
                                 merge_row(call, partials, b, b_kv % p.kv_heads, i,
                                           static_cast<int>(r % call.group), row);
                         });
}

}  // namespace condensate::cpu
