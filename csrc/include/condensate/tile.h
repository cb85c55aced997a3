// Sequences and tiles. Kernels ask them for lengths, positions and indices, never the call, whose
// lengths are those of its tensors.
#pragma once

#include <cstdint>

#include "condensate/params.h"

namespace condensate {

// The log2 of a power of two.
CONDENSATE_HOST_DEVICE int log2_of(int power) {
#ifdef __CUDA_ARCH__
    return 31 - __clz(power);
#else
    int log2 = 0;
    while (1 << log2 < power) ++log2;
    return log2;
#endif
}

// Queries and keys of one entry of the batch: where entries of different lengths would come in.
struct Sequence {
    int64_t query_len, kv_len;

    CONDENSATE_HOST_DEVICE Sequence(const Problem& p, int64_t /*batch*/)
        : query_len(p.query_len), kv_len(p.kv_len) {}

    CONDENSATE_HOST_DEVICE Ranges ranges(const Problem& p) const {
        return {kv_len, p.window, p.anchors, p.causal};
    }
    CONDENSATE_HOST_DEVICE int64_t position_of(int64_t query) const {
        return query_position(query, query_len, kv_len);
    }
};

// Consecutive queries of all heads that share one KV head; they share a list, a walk and a far
// field. Row r is query r % positions of head r / positions. A scan tile has more positions.
struct Tile : Sequence {
    int batch, kv_head, group;
    int positions;  // of a full tile, a power of two
    int log2_positions;
    int64_t first_query;
    int64_t index;  // in [B, Hkv, T], or of as many scan tiles

    // `head` counts [B, Hkv].
    CONDENSATE_HOST_DEVICE Tile(const Problem& p, int64_t head, int64_t tile)
        : Tile(p, head, tile, tile_positions(p.group())) {}
    // Of tiles of so many positions.
    CONDENSATE_HOST_DEVICE Tile(const Problem& p, int64_t head, int64_t tile, int positions)
        : Sequence(p, head / p.kv_heads), group(p.group()), positions(positions) {
        log2_positions = log2_of(positions);
        batch = static_cast<int>(head / p.kv_heads);
        kv_head = static_cast<int>(head % p.kv_heads);
        first_query = tile * positions;
        index = head * ceil_div(p.query_len, positions) + tile;
    }
    // The n-th tile with KV heads major, and the last (longest) tile of a head first.
    CONDENSATE_HOST_DEVICE static Tile longest_first(const Problem& p, int64_t n) {
        return longest_first(p, n, tile_positions(p.group()));
    }
    CONDENSATE_HOST_DEVICE static Tile longest_first(const Problem& p, int64_t n, int positions) {
        const int64_t tiles = ceil_div(p.query_len, positions);
        return Tile(p, n / tiles, tiles - 1 - n % tiles, positions);
    }

    // Positions of its first and last query.
    CONDENSATE_HOST_DEVICE TileSpan span() const {
        return tile_span(first_query >> log2_positions, positions, query_len, kv_len);
    }
    // In [B, Hkv].
    CONDENSATE_HOST_DEVICE int flat_kv_head(const Problem& p) const {
        return batch * static_cast<int>(p.kv_heads) + kv_head;
    }

    // ---- Rows ----

    CONDENSATE_HOST_DEVICE int rows() const { return positions * group; }
    // Queries of it that exist.
    CONDENSATE_HOST_DEVICE int queries() const {
        return static_cast<int>(min_i64(positions, query_len - first_query));
    }
    CONDENSATE_HOST_DEVICE int64_t end_query() const { return first_query + queries(); }
    CONDENSATE_HOST_DEVICE int first_head() const { return kv_head * group; }
    CONDENSATE_HOST_DEVICE int end_head() const { return first_head() + group; }
    CONDENSATE_HOST_DEVICE int64_t query(int row) const {
        return first_query + (row & (positions - 1));
    }
    CONDENSATE_HOST_DEVICE int head(int row) const {
        return kv_head * group + (row >> log2_positions);
    }
    CONDENSATE_HOST_DEVICE bool exists(int row) const {
        return row < rows() && query(row) < query_len;
    }
    CONDENSATE_HOST_DEVICE int64_t position(int row) const { return position_of(query(row)); }
    // Index of a query, or of a row, in a contiguous [B, Hq, Lq] tensor.
    CONDENSATE_HOST_DEVICE int64_t flat_query(const Problem& p, int64_t head, int64_t query) const {
        return (batch * p.query_heads + head) * p.query_len + query;
    }
    CONDENSATE_HOST_DEVICE int64_t flat_row(const Problem& p, int row) const {
        return flat_query(p, head(row), query(row));
    }
};

}  // namespace condensate
