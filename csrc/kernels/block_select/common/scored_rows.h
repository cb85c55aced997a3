// The rows of a tile or scan tile that are scored, queries averaged over a few positions: what they
// see, and how they come about.
#pragma once

#include "condensate/params.h"
#include "condensate/tile.h"
#include "device/pack.h"
#include "device/smem_tile.h"

namespace condensate::kernels::block_select {

// The averaged queries of a tile without gaps: row r is bin r % bins of head r / bins.
struct PooledRows {
    Tile tile;
    int pool;   // positions averaged
    int pools;  // per head that hold a query
    int rows;
    int inverse;  // ceil(2^16 / pools): row / pools == row * inverse >> 16 for rows < 128

    __device__ PooledRows(const Tile& tile, int pool) : tile(tile), pool(pool) {
        pools = (tile.queries() + pool - 1) / pool;
        rows = pools * tile.group;
        inverse = (65535 + pools) / pools;
    }
    // Of a scan tile.
    __device__ static PooledRows of_scan(const BlockSelectParams& params, const Tile& tile) {
        return PooledRows(tile, scan_pool_size(params.selector, tile.group, tile.kv_len));
    }
    __device__ static PooledRows of_tile(const Tile& tile) {
        return PooledRows(tile, pool_size(tile.group));
    }

    __device__ int head_in_group(int row) const { return row * inverse >> 16; }
    __device__ int head(int row) const { return tile.kv_head * tile.group + head_in_group(row); }
    __device__ int64_t first_query(int row) const {
        return tile.first_query + (row - head_in_group(row) * pools) * pool;
    }
    // Existing queries of the pool; 0 for rows past the tile.
    __device__ int size(int row) const {
        if (row >= rows) return 0;
        return static_cast<int>(min_i64(tile.query_len - first_query(row), pool));
    }
    __device__ int64_t last_position(int row) const {
        return tile.position_of(first_query(row) + size(row) - 1);
    }
    // Index of the pool's first query in a contiguous [B, Hq, Lq] tensor.
    __device__ int64_t flat_row(const Problem& p, int row) const {
        return tile.flat_query(p, head(row), first_query(row));
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

// Adds the first kMost of `size` queries of a pool over 8 channels, in float32; all loads are in
// flight.
template <int kMost, class T>
__device__ __forceinline__ void add_queries(float (&sum)[8], const T* src, int64_t stride,
                                            int size) {
    uint4 packed[kMost];
#pragma unroll
    for (int q = 0; q < kMost; ++q) {
        packed[q] = {};
        if (q < size) packed[q] = __ldg(reinterpret_cast<const uint4*>(src + q * stride));
    }
#pragma unroll
    for (int q = 0; q < kMost; ++q) {
        const T* elements = reinterpret_cast<const T*>(&packed[q]);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += static_cast<float>(elements[e]);
    }
}

// Each warp fills its rows of the CTA with the tile's from `first_row` on, averaged over their
// pools: kMost positions at a time, at most so many unless kLonger. Quest's bound is a dot product
// of [max(q,0) | min(q,0)] with [max | min], so its queries take two halves.
template <class Traits, int kMost, bool kLonger = false>
__device__ __forceinline__ void load_pooled_queries(uint32_t tile_smem,
                                                    const BlockSelectParams& params,
                                                    const PooledRows& pooled, int first_row) {
    using T = typename Traits::T;
    constexpr int kChunks = Traits::kDim / 8, kRowLanes = 4;  // of 8 channels; that share a row
    constexpr bool kQuest = selector_traits(Traits::kSelector).content == UnitContent::kBounds;
    const int query_chunks = static_cast<int>(params.problem.head_dim / 8);
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows;
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int i = lane / kRowLanes; i < Traits::kWarpRows; i += 32 / kRowLanes) {
        const int row = first_row + i, size = pooled.size(row);
        const T* row_gmem = static_cast<const T*>(params.query.data);
        if (size > 0)
            row_gmem +=
                params.query.offset(pooled.tile.batch, pooled.head(row), pooled.first_query(row));
        const float share = 1.0f / static_cast<float>(max(size, 1));
#pragma unroll 2
        for (int chunk = lane % kRowLanes; chunk < kChunks; chunk += kRowLanes) {
            const bool low_half = kQuest && chunk >= query_chunks;
            const int source = low_half ? chunk - query_chunks : chunk;
            const T* src = row_gmem + source * 8;
            const int queries = source < query_chunks ? size : 0;
            float mean[8] = {};
            add_queries<kMost>(mean, src, params.query.stride_seq, queries);
            if constexpr (kLonger) {
                for (int first = kMost; first < queries; first += kMost)
                    add_queries<kMost>(mean, src + first * params.query.stride_seq,
                                       params.query.stride_seq, queries - first);
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                mean[e] *= share;
                // NaN stays NaN.
                if (kQuest && (low_half ? mean[e] > 0.0f : mean[e] < 0.0f)) mean[e] = 0.0f;
            }
            uint4 packed = {device::pack2<T>(mean[0], mean[1]), device::pack2<T>(mean[2], mean[3]),
                            device::pack2<T>(mean[4], mean[5]), device::pack2<T>(mean[6], mean[7])};
            ptx::store_smem_16(tile_smem + device::tile_offset<Traits::kDim>(warp_row + i, chunk),
                               packed);
        }
    }
    __syncwarp();
}

}  // namespace condensate::kernels::block_select
