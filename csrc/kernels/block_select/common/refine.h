// The refinement of shortlists. A persistent CTA takes a tile at a time. One pass over the short
// units of all walked blocks finds each row's softmax sum, one over the units or keys of the
// shortlist the masses; the largest are the list.
#pragma once

#include "kernels/block_select/common/refined_tile.h"
#include "kernels/block_select/common/top_blocks.h"

namespace condensate::kernels::block_select {

template <class Traits>
__device__ __forceinline__ void find_norm(RefinedTile<Traits>& tile) {
    constexpr int kMTiles = Traits::kMTiles;
    auto& smem = tile.smem;
    device::OnlineSoftmax<kMTiles> softmax;
    tile.template sweep<kShortUnits.per_block>(
        kShortUnits, smem.walked.size, [&](int i) { return smem.walked.at(i); },
        [&](typename RefinedTile<Traits>::Scores& s, int) {
            float rescale[kMTiles][2];
            softmax.raise(s, tile.scale_log2, rescale);
            softmax.weigh(s, tile.scale_log2);
        });
    // Against keys a unit counts as many times as it has keys.
    tile.rows.normalise(softmax, Traits::kKeys ? log2f(kShortUnits.keys) : 0.0f);
}

// Of every entry of the shortlist, the largest over each warp's rows. The few that the tile may not
// list, all in its windows, are dropped when it chooses.
template <class Traits>
__device__ __forceinline__ void find_masses(RefinedTile<Traits>& tile, uint32_t* masses,
                                            int width) {
    constexpr UnitLevel kLevel =
        refinement_level(Traits::kKeys ? Refinement::kKeys : Refinement::kUnits);
    constexpr int kBlocks = kChunkUnits / kLevel.per_block;
    const int lane = threadIdx.x & 31;
    auto& smem = tile.smem;
    tile.template sweep<kLevel.per_block>(
        kLevel, smem.shortlist.entries, [&](int i) { return __ldg(smem.walked.list + i); },
        [&](typename RefinedTile<Traits>::Scores& s, int first) {
            tile.rows.weigh(s, tile.scale_log2);
            const float mass = chunk_masses<kLevel.per_block, Traits::kWgmma>(s);
            if (lane < kBlocks && first + lane < smem.shortlist.entries)
                masses[threadIdx.x / 32 * width + first + lane] = __float_as_uint(mass);
        });
}

// The list, from the warps' masses of the shortlist; one warp calls it.
template <class Traits>
__device__ __forceinline__ void choose(const RefinedSmem<Traits>& smem,
                                       const BlockSelectParams& params, uint32_t* histogram_smem,
                                       uint32_t* masses, int width, int keep) {
    const int warps = (smem.pooled.rows + Traits::kWarpRows - 1) / Traits::kWarpRows;
    const TileShortlist shortlist = smem.shortlist;
    for (int first = 0; first < shortlist.count; first += 32) {
        const int i = first + static_cast<int>(threadIdx.x & 31), from = shortlist.place(i);
        uint32_t mass = 0;
        for (int w = 0; w < warps && i < shortlist.count; ++w)
            mass = max(mass, masses[w * width + from]);
        __syncwarp();  // all lanes have read what is overwritten now
        if (i < shortlist.count) masses[i] = mass;
    }
    __syncwarp();
    const int64_t tile = smem.pooled.tile.index;
    const int count =
        write_heaviest(masses, shortlist, shortlist.count, keep, params.top_p, histogram_smem,
                       params.block_indices + tile * params.max_blocks, params.max_blocks);
    if ((threadIdx.x & 31) == 0) params.block_counts[tile] = count;
}

// A tile without a choice: all eligible blocks are listed.
__device__ __forceinline__ void take_all(const BlockSelectParams& params, const PooledRows& rows,
                                         const EligibleBlocks& eligible) {
    if (threadIdx.x < 32) {
        write_all(eligible, params.block_indices + rows.tile.index * params.max_blocks,
                  params.max_blocks);
        if (threadIdx.x == 0) params.block_counts[rows.tile.index] = eligible.count();
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    block_refine_kernel(const __grid_constant__ BlockSelectParams params,
                        const __grid_constant__ Shortlists shortlists, uint32_t* masses_gmem,
                        const __grid_constant__ int tiles,
                        const __grid_constant__ typename Traits::Maps maps) {
    extern __shared__ __align__(1024) char smem_bytes[];
    auto& smem = *reinterpret_cast<RefinedSmem<Traits>*>(smem_bytes);
    const int width = shortlists.width;
    uint32_t streamed = 0;
    init_stages<Traits>(smem);
    // Of the shortlist: [warp][width]. The first histogram counts, the others are free.
    uint32_t* const masses = width * Traits::kWarps <= (Traits::kWarps - 1) * kRadixBins
                                 ? smem.histogram[1]
                                 : masses_gmem + int64_t{blockIdx.x} * Traits::kWarps * width;

    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const PooledRows pooled = PooledRows::of_tile(Tile::longest_first(params.problem, index));
        const EligibleBlocks eligible = eligible_blocks(params, pooled.tile);
        const int keep = static_cast<int>(params.head_blocks(pooled.tile.kv_head));
        if (eligible.count() <= keep) {
            take_all(params, pooled, eligible);
            continue;
        }
        RefinedTile<Traits> tile(smem, params, maps, streamed);
        tile.begin(pooled, eligible, shortlists);
        find_norm(tile);
        find_masses(tile, masses, width);
        // The other warps go on to load the next tile: its state in shared memory is thread 0's to
        // write, its masses come after barriers.
        if (threadIdx.x < 32) choose(smem, params, smem.histogram[0], masses, width, keep);
    }
}

}  // namespace condensate::kernels::block_select
