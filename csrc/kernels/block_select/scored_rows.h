// Which rows of a tile are scored: pooled queries by the scan, every query by the refinement; what
// they see, and how pooled ones come about.
#pragma once

#include "condensate/params.h"
#include "device/pack.h"
#include "device/smem_tile.h"
#include "device/tile_rows.h"

namespace condensate::kernels::block_select {

// Where the pooled rows of a tile come from: row r is pool r % pools of head
// r / pools, pools a power of two.
struct PooledRows {
    int pool;        // positions averaged
    int log2_pools;  // pools per head
    int rows;

    __device__ explicit PooledRows(const device::TileRows& tile) : pool(query_pool(tile.group)) {
        log2_pools = 31 - __clz(tile.positions / pool);
        rows = tile.group << log2_pools;
    }

    __device__ int64_t first_query(const device::TileRows& tile, int row) const {
        return tile.first_query + (row & ((1 << log2_pools) - 1)) * pool;
    }
    __device__ int head(const device::TileRows& tile, int row) const {
        return tile.kv_head * tile.group + (row >> log2_pools);
    }
    // Existing queries of the pool; 0 for rows past the tile or the sequence.
    __device__ int size(const device::TileRows& tile, int row) const {
        if (row >= rows) return 0;
        return static_cast<int>(min_i64(max_i64(tile.query_len - first_query(tile, row), 0), pool));
    }
    __device__ int64_t last_position(const device::TileRows& tile, int row) const {
        return query_position(first_query(tile, row) + size(tile, row) - 1, tile.query_len,
                              tile.kv_len);
    }
};

// The existing rows of a tile without gaps: row r is query r % positions of head r / positions.
struct RefinedRows {
    device::TileRows tile;
    int positions, rows;
    int inverse;  // ceil(2^16 / positions): row / positions == row * inverse >> 16 for rows < 128

    __device__ explicit RefinedRows(const device::TileRows& tile)
        : tile(tile),
          positions(static_cast<int>(min_i64(tile.positions, tile.query_len - tile.first_query))),
          rows(positions * tile.group),
          inverse((65535 + positions) / positions) {}
    __device__ int head_in_group(int row) const { return row * inverse >> 16; }
    __device__ int head(int row) const { return tile.kv_head * tile.group + head_in_group(row); }
    __device__ int64_t query(int row) const {
        return tile.first_query + row - head_in_group(row) * positions;
    }
    __device__ int64_t flat_row(int row, int64_t query_heads) const {
        return (tile.batch * query_heads + head(row)) * tile.query_len + query(row);
    }
};

// Units that a query sees; units are in key order, so they are a prefix.
__device__ __forceinline__ int visible_units(const Ranges& r, int64_t last_position,
                                             int unit_keys) {
    if (!r.causal || last_position >= r.kv_len - 1) {
        return static_cast<int>(ceil_div(r.kv_len, unit_keys));
    }
    return last_position < 0 ? 0 : static_cast<int>((last_position + 1) / unit_keys);
}

// Sum of the existing queries of a pool over 8 channels, in float32; all loads are in flight.
template <class T>
__device__ __forceinline__ void sum_queries(float (&sum)[8], const T* src, int64_t stride,
                                            int size) {
    uint4 packed[kQueryPool];
#pragma unroll
    for (int q = 0; q < kQueryPool; ++q) {
        packed[q] = {};
        if (q < size) packed[q] = __ldg(reinterpret_cast<const uint4*>(src + q * stride));
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] = 0.0f;
#pragma unroll
    for (int q = 0; q < kQueryPool; ++q) {
        const T* elements = reinterpret_cast<const T*>(&packed[q]);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += static_cast<float>(elements[e]);
    }
}

// Each warp fills its 32 rows of a tile. Quest's bound is a dot product of [max(q,0) | min(q,0)]
// with [max | min], so its queries take two halves.
template <class Traits>
__device__ __forceinline__ void load_pooled_queries(uint32_t tile_smem,
                                                    const BlockSelectParams& params,
                                                    const device::TileRows& tile,
                                                    const PooledRows& pooled) {
    using T = typename Traits::T;
    constexpr int kChunks = Traits::kDim / 8;
    constexpr bool kQuest = Traits::kSelector == Selector::kQuest;
    const int query_chunks = static_cast<int>(params.problem.head_dim / 8);
    const int summary_chunks = kQuest ? 2 * query_chunks : query_chunks;
#pragma unroll 2
    for (int i = threadIdx.x & 31; i < Traits::kWarpRows * kChunks; i += 32) {
        int row = i / kChunks, warp_row = threadIdx.x / 32 * Traits::kWarpRows, chunk = i % kChunks;
        bool low_half = kQuest && chunk >= query_chunks;
        int size = chunk < summary_chunks ? pooled.size(tile, row) : 0;
        const T* src = static_cast<const T*>(params.query.data);
        if (size > 0) {
            src += device::head_offset(params.query, tile.batch, pooled.head(tile, row)) +
                   pooled.first_query(tile, row) * params.query.stride_seq +
                   (low_half ? chunk - query_chunks : chunk) * 8;
        }
        float mean[8];
        sum_queries(mean, src, params.query.stride_seq, size);
        float existing = static_cast<float>(max(size, 1));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            mean[e] = static_cast<float>(static_cast<T>(mean[e] / existing));
            // NaN stays NaN.
            if (kQuest && (low_half ? mean[e] > 0.0f : mean[e] < 0.0f)) mean[e] = 0.0f;
        }
        uint4 packed = {device::pack2<T>(mean[0], mean[1]), device::pack2<T>(mean[2], mean[3]),
                        device::pack2<T>(mean[4], mean[5]), device::pack2<T>(mean[6], mean[7])};
        ptx::store_smem_16(tile_smem + device::tile_offset<Traits::kDim>(warp_row + row, chunk),
                           packed);
    }
    __syncwarp();
}

}  // namespace condensate::kernels::block_select
