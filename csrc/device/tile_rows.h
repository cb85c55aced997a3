// Which query and head each row of a tile is, and which tile a CTA works on.
#pragma once

#include <cstdint>

#include "condensate/params.h"

namespace condensate::device {

struct TileRows {
    int batch, kv_head, group;
    int positions;  // P, or those of a scan tile; a power of two
    int log2_positions;
    int64_t first_query;  // of the tile
    int64_t query_len, kv_len;
    int64_t tile_index;  // in [B, Hkv, T], or of as many scan tiles

    // `index` counts tiles with KV heads major, and the last (longest) tile of a head first.
    __device__ static TileRows from_index(const Problem& p, int64_t index) {
        return from_index(p, index, tile_positions(p.group()));
    }
    __device__ static TileRows from_index(const Problem& p, int64_t index, int positions) {
        int64_t tiles = ceil_div(p.query_len, positions);
        return TileRows(p, index / tiles, tiles - 1 - index % tiles, positions);
    }

    // `head` counts [B, Hkv].
    __device__ TileRows(const Problem& p, int64_t head, int64_t tile)
        : TileRows(p, head, tile, tile_positions(p.group())) {}
    // Of tiles of so many positions.
    __device__ TileRows(const Problem& p, int64_t head, int64_t tile, int positions)
        : group(p.group()), positions(positions), query_len(p.query_len), kv_len(p.kv_len) {
        log2_positions = 31 - __clz(positions);
        batch = static_cast<int>(head / p.kv_heads);
        kv_head = static_cast<int>(head % p.kv_heads);
        first_query = tile * positions;
        tile_index = head * ceil_div(p.query_len, positions) + tile;
    }

    // In [B, Hkv].
    __device__ int flat_kv_head(const Problem& p) const {
        return batch * static_cast<int>(p.kv_heads) + kv_head;
    }
    __device__ int rows() const { return positions * group; }
    __device__ int64_t query(int row) const { return first_query + (row & (positions - 1)); }
    __device__ int head(int row) const { return kv_head * group + (row >> log2_positions); }
    __device__ bool exists(int row) const { return row < rows() && query(row) < query_len; }
    __device__ int64_t position(int row) const {
        return query_position(query(row), query_len, kv_len);
    }
    __device__ TileSpan span() const {
        return tile_span(first_query >> log2_positions, positions, query_len, kv_len);
    }
    // Index of a row in a contiguous [B, Hq, Lq] tensor.
    __device__ int64_t flat_row(int row, int64_t query_heads) const {
        return (batch * query_heads + head(row)) * query_len + query(row);
    }
};

// Element offset of (batch, head, row 0) in a strided tensor.
__device__ __forceinline__ int64_t head_offset(const ConstTensor4& t, int batch, int head) {
    return batch * t.stride_batch + head * t.stride_head;
}

}  // namespace condensate::device
