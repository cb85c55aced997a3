// What a refined selection leaves out, estimated: another look at the units or keys of all walked
// blocks, once the lists are known. A CTA a tile.
#pragma once

#include "kernels/block_select/common/outside_share.h"
#include "kernels/block_select/common/refined_tile.h"

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

// Adds up the logs of what each row has in some blocks.
template <class Traits>
struct BlockLogs {
    static constexpr int kMTiles = Traits::kMTiles;
    float log2_sum[kMTiles][2] = {};  // of a lane

    // `sign` times those of the lane's v-th block of the chunk where counts(v).
    template <class Layout, class Counts>
    __device__ __forceinline__ void add(const typename HeldRows<Traits>::Scores& s,
                                        float scale_log2, float sign, Counts&& counts) {
        // The lanes that share a block in order all find its log; one adds it.
        const bool adds = !Layout::kInOrder || (threadIdx.x & 3) == 0;
#pragma unroll
        for (int v = 0; v < Layout::kLaneBlocks; ++v) {
            const bool counted = counts(v) && adds;
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    auto score = [&](int unit) {
                        const int place = v * Layout::kLaneUnits + unit;
                        return s[m][place / 2][2 * half + place % 2];
                    };
                    float most = score(0), sum = 0.0f;
#pragma unroll
                    for (int i = 1; i < Layout::kLaneUnits; ++i) most = fmaxf(most, score(i));
                    if constexpr (Layout::kInOrder) most = device::quad_max(most);
                    const float reference = device::finite_reference(most * scale_log2);
#pragma unroll
                    for (int i = 0; i < Layout::kLaneUnits; ++i)
                        sum += ptx::exp2_approx(fmaf(score(i), scale_log2, -reference));
                    if constexpr (Layout::kInOrder) sum = device::quad_sum(sum);
                    log2_sum[m][half] += counted ? sign * (reference + log2f(sum)) : 0.0f;
                }
        }
    }
};

// Turns the tile's estimates, which hold log2 of the pooled sum R outside its scan tile's walk,
// into the share of what the attention does not walk.
template <class Traits>
__device__ __forceinline__ void estimate_tile(RefinedTile<Traits>& tile) {
    constexpr UnitLevel kLevel =
        refinement_level(Traits::kKeys ? Refinement::kKeys : Refinement::kUnits);
    using Layout = ChunkLayout<kLevel.per_block, Traits::kWgmma>;
    using Scores = typename RefinedTile<Traits>::Scores;
    auto& smem = tile.smem;
    const BlockSelectParams& params = tile.params;
    const PooledRows& pooled = smem.pooled;
    const RangeBlocks ranges(pooled.tile.ranges(params.problem), pooled.tile.span());
    const int32_t* list = params.block_indices + pooled.tile.index * params.max_blocks;
    const int count = params.block_counts[pooled.tile.index];
    auto block_at = [&](int place) { return smem.walked.at(place); };
    auto is_left = [&](int place) {
        const int block = place < smem.walked.size ? block_at(place) : -1;
        return block >= 0 && !ranges.contains(block) && !is_listed(list, count, block);
    };
    OutsideShare<Traits> shares;
    BlockLogs<Traits> gaps;
    int left_blocks = 0;
    tile.template sweep<kLevel.per_block>(
        kLevel, smem.walked.size, block_at, [&](Scores& s, int first) {
            auto counts = [&](int v) { return is_left(first + Layout::block(v)); };
            if constexpr (Traits::kKeys) {
                left_blocks += counts(0);
                gaps.template add<Layout>(s, tile.scale_log2, 1.0f, counts);
            }
            shares.template add<Layout>(s, tile.scale_log2, counts);
        });
    shares.reduce();
    if constexpr (Traits::kKeys) {
        using Units = ChunkLayout<kShortUnits.per_block, Traits::kWgmma>;
        tile.template sweep<kShortUnits.per_block>(
            kShortUnits, smem.walked.size, block_at, [&](Scores& s, int first) {
                gaps.template add<Units>(s, tile.scale_log2, -1.0f,
                                         [&](int v) { return is_left(first + Units::block(v)); });
            });
    }
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile.rows.row(m, half);
            float raised = 0.0f;  // log2 of what R is short of
            if constexpr (Traits::kKeys) {
                const float unit_keys = log2f(kShortUnits.keys);
                const float gap = device::quad_sum(gaps.log2_sum[m][half]) /
                                      static_cast<float>(max(left_blocks, 1)) -
                                  unit_keys;
                raised = unit_keys + (left_blocks > 0 && fabsf(gap) < INFINITY ? gap : 0.0f);
            }
            if ((threadIdx.x & 3) != 0 || row >= pooled.rows) continue;
            float* at = params.omitted_mass_estimate + pooled.flat_row(params.problem, row);
            // The bound keeps inf / inf away.
            const float unseen = fminf(exp2f(*at + raised - shares.reference(m, half)), 1e30f);
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
    const PooledRows pooled = PooledRows::of_tile(Tile::longest_first(params.problem, blockIdx.x));
    const EligibleBlocks eligible = eligible_blocks(params, pooled.tile);
    if (eligible.count() <= params.head_blocks(pooled.tile.kv_head)) {  // all are listed
        for (int row = threadIdx.x; row < pooled.rows; row += Traits::kThreads) {
            int64_t at = pooled.flat_row(params.problem, row);
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
