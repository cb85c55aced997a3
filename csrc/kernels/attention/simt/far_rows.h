// The far field's pooled rows as float32 in shared memory: premade means, then what the tile
// changes.
#pragma once

#include "device/far_rows.h"
#include "device/simt/key_tile.h"

namespace condensate::kernels::simt {

struct FarSmem {
    int keys[kTileKeys];  // that a staged row stands for
    device::WalkSmem<kWarps, 64> walk;
};

// A lane's channels of a head's key or value means: lane + 32 c.
template <class T, int kDim>
struct LaneChannels {
    static constexpr int kElems = kDim / 32;
    const T* block_means;
    const float* sums;  // running, of pool 0
    const T* means;
    int64_t stride_block;
    int head_dim;

    __device__ LaneChannels(const AttentionParams& params, const device::FarTile& far, int head,
                            int which) {
        const Problem& p = params.problem;
        const BlockMeans& blocks = which == 0 ? params.far_field.key : params.far_field.value;
        block_means = static_cast<const T*>(blocks.data) + head * blocks.stride_head;
        stride_block = blocks.stride_block;
        sums =
            params.far_field.sums + device::far_pools_offset(p, far, which, head, far.pool_sums());
        means = static_cast<const T*>(params.far_field.means) +
                device::far_pools_offset(p, far, which, head);
        head_dim = static_cast<int>(p.head_dim);
    }

    // Calls body(e, channel) for the channels that exist.
    template <class Body>
    __device__ __forceinline__ void each(const Body& body) const {
        Lane lane;
#pragma unroll
        for (int e = 0; e < kElems; ++e)
            if (lane.lane + 32 * e < head_dim) body(e, lane.lane + 32 * e);
    }
    // sum += keys * the block's mean.
    __device__ __forceinline__ void add(float (&sum)[kElems], int block, int keys) const {
        const T* row = block_means + block * stride_block;
        each([&](int e, int d) {
            sum[e] = fmaf(static_cast<float>(keys), to_float(row[d]), sum[e]);
        });
    }
    __device__ __forceinline__ void load_sum(float (&sum)[kElems], int index) const {
        const float* row = sums + int64_t{index} * head_dim;
        Lane lane;
#pragma unroll
        for (int e = 0; e < kElems; ++e)
            sum[e] = lane.lane + 32 * e < head_dim ? row[lane.lane + 32 * e] : 0.0f;
    }
    // Means are rounded to the tensors' type, whatever computes with them.
    __device__ __forceinline__ void store(float* row_smem, const float (&mean)[kElems]) const {
        each([&](int e, int d) { row_smem[d] = to_float(from_float<T>(mean[e])); });
    }
    __device__ __forceinline__ void copy_premade(float* row_smem, int pool) const {
        each([&](int, int d) { row_smem[d] = to_float(means[int64_t{pool} * head_dim + d]); });
    }
    __device__ __forceinline__ void clear(float* row_smem) const {
        each([&](int, int d) { row_smem[d] = 0.0f; });
    }
};

// Stages key (`which` 0) or value rows of pools first..first + 31, each by one warp; rows past the
// tile's pools, and those without keys, are zero. All threads call it, between barriers.
template <class T, int kDim>
__device__ __forceinline__ void stage_pools(float* tile_smem, FarSmem& smem,
                                            const AttentionParams& params, int head,
                                            const device::FarTile& far, int which, int first) {
    constexpr int kStride = KeyTile<kDim>::kStride;
    const Lane lane;
    const LaneChannels<T, kDim> channels(params, far, head, which);
#pragma unroll 1
    for (int row = lane.warp; row < kTileKeys; row += kWarps) {
        const bool exists = first + row < far.pools();
        if (exists)
            channels.copy_premade(tile_smem + row * kStride, first + row);
        else
            channels.clear(tile_smem + row * kStride);
        if (lane.lane == 0 && which == 0) smem.keys[row] = exists ? far.pool_keys(first + row) : 0;
    }
    device::for_changed_pools(
        far, channels, device::WarpWalk(smem.walk),
        [&](int pool, int) {
            const int row = pool - first;
            return row >= 0 && row < kTileKeys && row % kWarps == lane.warp;
        },
        [&](int pool, int, int keys, const float (&mean)[kDim / 32]) {
            channels.store(tile_smem + (pool - first) * kStride, mean);
            if (lane.lane == 0 && which == 0) smem.keys[pool - first] = keys;
        });
}

}  // namespace condensate::kernels::simt
