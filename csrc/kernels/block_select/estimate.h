// What a refined selection leaves out, estimated: one look at the short units of all walked blocks,
// once the lists are known. A CTA a tile.
#pragma once

#include "kernels/block_select/outside_share.h"
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

// Turns the tile's estimates, which hold log2 of the pooled sum R outside its scan tile's walk,
// into the share of what the attention does not walk.
template <class Traits>
__device__ __forceinline__ void estimate_tile(RefinedTile<Traits>& tile) {
    using Layout = ChunkLayout<kShortUnits.per_block, Traits::kWgmma>;
    auto& smem = tile.smem;
    const BlockSelectParams& params = tile.params;
    const PooledRows& pooled = smem.pooled;
    const RangeBlocks ranges(params.problem.ranges(), pooled.tile.span());
    const int32_t* list = params.block_indices + pooled.tile.tile_index * params.max_blocks;
    const int count = params.block_counts[pooled.tile.tile_index];
    OutsideShare<Traits> shares;
    tile.template sweep<kShortUnits.per_block>(
        kShortUnits, smem.walked.size, [&](int i) { return smem.walked.at(i); },
        [&](typename RefinedTile<Traits>::Scores& s, int first) {
            shares.template add<Layout>(s, tile.scale_log2, [&](int v) {
                const int place = first + Layout::block(v);
                const int block = place < smem.walked.size ? smem.walked.at(place) : -1;
                return block >= 0 && !ranges.contains(block) && !is_listed(list, count, block);
            });
        });
    shares.reduce();
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile.rows.row(m, half);
            if ((threadIdx.x & 3) != 0 || row >= pooled.rows) continue;
            float* at =
                params.omitted_mass_estimate + pooled.flat_row(row, params.problem.query_heads);
            // The bound keeps inf / inf away.
            const float unseen = fminf(exp2f(*at - shares.reference(m, half)), 1e30f);
            const float share = shares.share(m, half, unseen);
            for (int i = 0; i < pooled.size(row); ++i) at[i] = share;
        }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    block_estimate_kernel(const __grid_constant__ BlockSelectParams params,
                          const __grid_constant__ Shortlists shortlists) {
    extern __shared__ __align__(1024) char smem_bytes[];
    auto& smem = *reinterpret_cast<RefinedSmem<Traits>*>(smem_bytes);
    const PooledRows pooled =
        PooledRows::of_tile(device::TileRows::from_index(params.problem, blockIdx.x));
    const EligibleBlocks eligible = eligible_blocks(params, pooled.tile);
    if (eligible.count() <= params.head_blocks(pooled.tile.kv_head)) {  // all are listed
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
