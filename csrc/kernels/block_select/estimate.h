// What a refined selection leaves out, estimated: one look at the fine units of all walked blocks,
// once the lists are known. A CTA a tile.
#pragma once

#include "kernels/block_select/refined_tile.h"

namespace condensate::kernels::block_select {

__device__ __forceinline__ bool is_listed(const int32_t* list, int count, int block) {
    int low = 0;  // entries before it are smaller than `block`
    for (int size = count; size > 0;) {
        int half = size / 2;
        bool smaller = list[low + half] < block;
        low = smaller ? low + half + 1 : low;
        size = smaller ? size - half - 1 : half;
    }
    return low < count && list[low] == block;
}

// Both sums are in units of 2^reference.
template <class Traits>
__device__ __forceinline__ void write_share(const RefinedTile<Traits>& tile, int row, float sum,
                                            float omitted, float reference) {
    const auto& smem = tile.smem;
    const BlockSelectParams& params = tile.params;
    const PooledRows& pooled = smem.pooled;
    if ((threadIdx.x & 3) != 0 || row >= pooled.rows) return;
    float* at = params.omitted_mass_estimate + pooled.flat_row(row, params.problem.query_heads);
    // A middle unit stands for four fine ones. The bound keeps inf / inf away.
    float unseen = fminf(4.0f * exp2f(*at - device::finite_reference(reference)), 1e30f);
    float share = (omitted + unseen) / (sum + unseen);
    share = fminf(fmaxf(share, 0.0f), 1.0f);  // 0 for NaN
    for (int i = 0; i < pooled.size(row); ++i) at[i] = share;
}

// Turns the tile's estimates, which hold log2 of the pooled sum R over blocks outside its scan
// tile's walk, into the share of what lies in eligible blocks that are not listed.
template <class Traits>
__device__ __forceinline__ void estimate_tile(RefinedTile<Traits>& tile) {
    constexpr int kMTiles = Traits::kMTiles;
    auto& smem = tile.smem;
    device::OnlineSoftmax<kMTiles> softmax;
    float omitted[kMTiles][2] = {};
    tile.template sweep<kRefinementLevels.mass.per_block>(
        kRefinementLevels.mass, smem.walked.size, [&](int i) { return smem.walked.at(i); },
        [&](typename RefinedTile<Traits>::Scores& s, int first) {
            float rescale[kMTiles][2];
            if (softmax.raise(s, tile.scale_log2, rescale)) {
#pragma unroll
                for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) omitted[m][half] *= rescale[m][half];
            }
            softmax.weigh(s, tile.scale_log2);
            const int place = first + static_cast<int>(threadIdx.x & 3);
            const int block = place < smem.walked.size ? smem.walked.at(place) : -1;
            const int width = static_cast<int>(tile.params.max_blocks);
            const int32_t* list = tile.params.block_indices + smem.pooled.tile.tile_index * width;
            const bool counts = smem.eligible.contains(block) && !is_listed(list, width, block);
            for_each_block<kRefinementLevels.mass.per_block, Sum>(
                s, [&](int, int m, int half, float weight) {
                    omitted[m][half] += counts ? weight : 0.0f;
                });
        });
    softmax.reduce_sums();
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            write_share(tile, tile.rows.row(m, half), softmax.row_sum[m][half],
                        device::quad_sum(omitted[m][half]), softmax.reference[m][half]);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    block_estimate_kernel(const __grid_constant__ BlockSelectParams params,
                          const __grid_constant__ Shortlists shortlists) {
    extern __shared__ __align__(1024) char smem_bytes[];
    auto& smem = *reinterpret_cast<RefinedSmem<Traits>*>(smem_bytes);
    const PooledRows pooled =
        PooledRows::of_refinement(device::TileRows::from_index(params.problem, blockIdx.x));
    const EligibleBlocks eligible(params.problem.ranges(), pooled.tile.span());
    if (eligible.count() <= params.max_blocks) {  // all are listed
        for (int row = threadIdx.x; row < pooled.rows; row += Traits::kThreads) {
            int64_t at = pooled.flat_row(row, params.problem.query_heads);
            for (int i = 0; i < pooled.size(row); ++i) params.omitted_mass_estimate[at + i] = 0.0f;
        }
        return;
    }
    static_assert(!Traits::kWgmma, "it sums what a lane holds of one block");
    uint32_t streamed = 0;
    const NoMaps maps;
    RefinedTile<Traits> tile(smem, params, maps, streamed);
    tile.begin(pooled, eligible, shortlists);
    estimate_tile(tile);
}

}  // namespace condensate::kernels::block_select
