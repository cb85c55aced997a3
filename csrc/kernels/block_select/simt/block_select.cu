// Block selection on CUDA cores: one CTA per scan tile, a unit per lane, four rows per warp, 32
// rows at a time. Every pass is a sweep over the units of one level of some blocks.
#include "device/tile_walk.h"
#include "kernels/block_select/common/eligible.h"
#include "kernels/block_select/simt/unit_sweep.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace simt {
namespace {

using block_select::EligibleBlocks;

constexpr int kCtasPerSm = 2;

int64_t select_smem_bytes(const BlockSelectParams& params) {
    int64_t dim = summary_dim(params.selector, static_cast<int>(params.problem.head_dim));
    return static_cast<int64_t>(sizeof(SelectSmem)) + kCtaRows * dim * 4;
}

int64_t all_scan_tiles(const BlockSelectParams& params) {
    const Problem& p = params.problem;
    return p.batch * p.kv_heads * num_scan_tiles(params.selector, p.query_len, p.group(), p.kv_len);
}

int64_t select_ctas(const BlockSelectParams& params, int sm_count) {
    return min_i64(all_scan_tiles(params), static_cast<int64_t>(kCtasPerSm) * sm_count);
}

// Blocks in a CTA's part of the workspace, each [num_blocks].
struct Scratch {
    static constexpr int kArrays = 4;
    uint32_t* masses;   // of the candidates: the eligible blocks, later the shortlist
    int32_t* eligible;  // ascending, later those of the shortlist
    int32_t* shortlist;
    int32_t* walked;

    __device__ Scratch(void* workspace, int64_t blocks)
        : masses(static_cast<uint32_t*>(workspace) + blockIdx.x * kArrays * blocks),
          eligible(reinterpret_cast<int32_t*>(masses + blocks)),
          shortlist(eligible + blocks),
          walked(shortlist + blocks) {}
};

template <class T>
struct TileSelection {
    const BlockSelectParams& params;
    SelectSmem& smem;
    const Tile& tile;
    Scratch scratch;
    UnitSweep<T> units;  // of the tile's KV head
    Lane lane = {};

    // Softmax sums of the warp's rows, which are rows first_row and on of the tile.
    __device__ __forceinline__ void find_norm(UnitLevel level, BlockSet set, int first_row,
                                              float log_factor = 0.0f) {
        LaneSum sums[kWarpRows];
        units.sweep(level, set, [&](const float (&score)[kWarpRows], int) {
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) sums[r].add(score[r]);
        });
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            float lse = sums[r].over_warp().lse() + log_factor;
            if (lane.lane == 0) smem.norm[first_row + lane.row(r)] = isfinite(lse) ? lse : INFINITY;
        }
        __syncwarp();
    }

    // Sum over the lanes of a block of what they hold of a row's softmax sum, or the hottest's.
    __device__ __forceinline__ float block_mass(float score, int row, int lanes,
                                                bool hottest) const {
        float mass = expf(score - smem.norm[row]);
        for (int offset = 1; offset < lanes; offset *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, mass, offset);
            mass = hottest ? fmaxf(mass, other) : mass + other;
        }
        return mass;
    }

    // scratch.masses[i]: of the set's i-th block, the largest over the rows so far. The keys of a
    // block pass by in two halves.
    __device__ __forceinline__ void find_masses(UnitLevel level, BlockSet set, int first_row,
                                                bool hottest) {
        const int lanes = min(level.per_block, kTileKeys);
        float first_half[kWarpRows] = {};
        bool second = level.per_block <= kTileKeys;
        units.sweep(level, set, [&](const float (&score)[kWarpRows], int place) {
            float largest = 0.0f;
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                const float mass =
                    first_half[r] + block_mass(score[r], first_row + lane.row(r), lanes, hottest);
                if (second) largest = fmaxf(largest, block_select::finite_mass(mass));
                if (level.per_block > kTileKeys) first_half[r] = second ? 0.0f : mass;
            }
            if (lane.lane % lanes == 0) smem.warp_mass[lane.warp][lane.lane / lanes] = largest;
            __syncthreads();
            const bool whole = second;
            if (level.per_block > kTileKeys) second = !second;
            // The sweep's barriers keep the next units' masses from these reads.
            int slot = static_cast<int>(threadIdx.x);
            int i = place - lane.lane / lanes + slot;
            if (!whole || slot >= kTileKeys / lanes || i >= set.count) return;
            float mass = first_row == 0 ? 0.0f : __uint_as_float(scratch.masses[i]);
            for (int warp = 0; warp < kWarps; ++warp)
                mass = fmaxf(mass, smem.warp_mass[warp][slot]);
            scratch.masses[i] = __float_as_uint(mass);
        });
        __syncthreads();
    }

    // The `keep` blocks of largest mass of the candidates, or fewer by top_p; returns how many. All
    // threads call it.
    __device__ int choose(const int32_t* candidates, int count, int keep, float top_p,
                          int32_t* list, int64_t width) {
        if (threadIdx.x < 32) {
            int taken = count;
            if (count <= keep) {  // without masses
                for (int i = lane.lane; i < count; i += 32) list[i] = candidates[i];
                block_select::pad_list(list, taken, width);
            } else {
                taken = block_select::write_heaviest(scratch.masses, candidates, count, keep, top_p,
                                                     smem.histogram, list, width);
            }
            if (lane.lane == 0) smem.count = taken;
        }
        return shared_count();
    }
    // What smem.count holds for all.
    __device__ int shared_count() {
        __syncthreads();
        int count = smem.count;
        __syncthreads();  // it may change
        return count;
    }

    // What a row's softmax over some blocks' units has in blocks that the attention does not walk.
    enum class Estimate {
        kShare,    // the share, of lists that the scan made
        kLogSum,   // the log of the sum, for the refinement
        kRefined,  // the share, together with that sum
    };
    template <class Outside>
    __device__ __forceinline__ void estimate(Estimate kind, const PooledRows& pooled,
                                             UnitLevel level, BlockSet set, int first_row,
                                             Outside&& outside) {
        LaneSum all[kWarpRows], omitted[kWarpRows];
        units.sweep(level, set, [&](const float (&score)[kWarpRows], int place) {
            const bool counts = place < set.count && outside(set.at(place));
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                all[r].add(score[r]);
                if (counts) omitted[r].add(score[r]);
            }
        });
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            LaneSum sum = all[r].over_warp(), part = omitted[r].over_warp();
            int row = first_row + lane.row(r);
            if (lane.lane != 0 || row >= pooled.rows) continue;
            float* at = params.omitted_mass_estimate + pooled.flat_row(params.problem, row);
            float reference = finite_reference(sum.largest);
            // The bound keeps inf / inf away.
            float unseen = kind == Estimate::kRefined ? fminf(expf(*at - reference), 1e30f) : 0.0f;
            float share = (part.sum * expf(part.largest - reference) + unseen) / (sum.sum + unseen);
            share = fminf(fmaxf(share, 0.0f), 1.0f);  // 0 for NaN
            const float value = kind == Estimate::kLogSum ? part.lse() : share;
            for (int i = 0; i < pooled.size(row); ++i) at[i] = value;
        }
    }
    // Raises the estimates, logs of the scan's sum R over units, by what units fall short of their
    // keys: by as much as those of the walked blocks that are left(block).
    template <class Left>
    __device__ __forceinline__ void raise_to_keys(const PooledRows& pooled, BlockSet walked,
                                                  int first_row, Left&& left) {
        LaneSum first_half[kWarpRows];
        float gap[kWarpRows] = {};  // of a lane: logs over keys less logs over units
        int left_blocks = 0;
        bool second = false;  // half of a block
        auto counts = [&](int place) { return place < walked.count && left(walked.at(place)); };
        units.sweep(kSingleKeys, walked, [&](const float (&score)[kWarpRows], int place) {
            const bool is_left = counts(place);
            left_blocks += is_left && second;
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                LaneSum block = first_half[r];
                block.add(score[r]);
                first_half[r] = second ? LaneSum{} : block;
                const float log_sum = block.over_warp().lse();
                if (second && is_left && lane.lane == 0) gap[r] += log_sum;
            }
            second = !second;
        });
        constexpr int kLanes = kShortUnits.per_block;
        units.sweep(kShortUnits, walked, [&](const float (&score)[kWarpRows], int place) {
            const bool adds = counts(place) && lane.lane % kLanes == 0;
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                LaneSum block;
                block.add(score[r]);
                const float log_sum = block.over_lanes(kLanes).lse();
                if (adds) gap[r] -= log_sum;
            }
        });
        const float unit_keys = logf(kShortUnits.keys);
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            const float mean =
                warp_sum(gap[r]) / static_cast<float>(max(left_blocks, 1)) - unit_keys;
            const int row = first_row + lane.row(r);
            if (lane.lane != 0 || row >= pooled.rows) continue;
            params.omitted_mass_estimate[pooled.flat_row(params.problem, row)] +=
                unit_keys + (left_blocks > 0 && fabsf(mean) < INFINITY ? mean : 0.0f);
        }
    }

    __device__ void write_estimates(const PooledRows& pooled, float value) {
        for (int row = static_cast<int>(threadIdx.x); row < pooled.rows; row += kThreads) {
            float* at = params.omitted_mass_estimate + pooled.flat_row(params.problem, row);
            for (int i = 0; i < pooled.size(row); ++i) at[i] = value;
        }
    }

    // The blocks that the attention would walk, into scratch.walked.
    __device__ BlockSet walk(BlockSet list) {
        if (threadIdx.x < 32) {
            device::WalkWriter writer(scratch.walked, INT_MAX, 0);
            const device::WalkCount count = writer.write(tile.ranges(params.problem), tile.span(),
                                                         {list.blocks, list.count, list.count});
            if (lane.lane == 0) smem.count = count.all;
        }
        return {scratch.walked, shared_count()};
    }

    // The scan's list, of `width` blocks, of which at most `keep` are taken.
    __device__ BlockSet scan(int32_t* list, int64_t width, int64_t most, float top_p) {
        const EligibleBlocks eligible = block_select::eligible_blocks(params, tile);
        const PooledRows pooled = PooledRows::of_scan(params, tile);
        const ScoringLevels levels = scan_levels(params.selector);
        const BlockSet reachable = {nullptr,
                                    reachable_blocks(tile.ranges(params.problem), tile.span())};
        const BlockSet candidates = {scratch.eligible, eligible.count()};
        const int keep = static_cast<int>(most);
        const bool chooses = candidates.count > keep;
        for (int i = threadIdx.x; i < candidates.count; i += kThreads)
            scratch.eligible[i] = eligible.at(i);
        __syncthreads();
        for (int row = 0; chooses && keep > 0 && row < pooled.rows; row += kCtaRows) {
            units.load_pooled(pooled, row);
            find_norm(levels.norm, reachable, row);
            find_masses(levels.mass, candidates, row, /*hottest=*/true);
        }
        const BlockSet taken = {
            list, choose(candidates.blocks, candidates.count, keep, top_p, list, width)};
        if (!params.omitted_mass_estimate) return taken;
        if (!chooses) {
            write_estimates(pooled, refines() ? -INFINITY : 0.0f);
            return taken;
        }
        const BlockSet walked = walk(taken);
        for (int row = 0; row < pooled.rows; row += kCtaRows) {
            units.load_pooled(pooled, row);
            estimate(refines() ? Estimate::kLogSum : Estimate::kShare, pooled, levels.mass,
                     reachable, row, [&](int block) { return !walked.contains(block); });
        }
        return taken;
    }
    __device__ bool refines() const { return params.refinement() != Refinement::kNone; }

    __device__ void make_list() {
        BlockSet taken = scan(params.block_indices + tile.index * params.max_blocks,
                              params.max_blocks, params.head_blocks(tile.kv_head), params.top_p);
        if (threadIdx.x == 0) params.block_counts[tile.index] = taken.count;
    }

    // Of a scan tile.
    __device__ void make_shortlist() {
        const int64_t blocks = num_blocks(params.problem.kv_len);
        const int64_t width =
            min_i64(shortlist_width(params.refinement(), params.max_blocks), blocks);
        BlockSet taken = scan(scratch.shortlist, width, width, 0.0f);
        if (threadIdx.x == 0) smem.shortlisted = taken.count;
    }

    // What the tile may list of the shortlist, into scratch.eligible.
    __device__ BlockSet eligible_of(BlockSet shortlist, const EligibleBlocks& eligible) {
        if (threadIdx.x < 32) {
            int count = 0;
            for (int first = 0; first < shortlist.count; first += 32) {
                const int i = first + lane.lane;
                const bool take = i < shortlist.count && eligible.contains(shortlist.at(i));
                const unsigned takers = __ballot_sync(0xffffffffu, take);
                if (take)
                    scratch.eligible[count + __popc(takers & block_select::lanes_before())] =
                        shortlist.at(i);
                count += __popc(takers);
            }
            if (lane.lane == 0) smem.count = count;
        }
        return {scratch.eligible, shared_count()};
    }

    // The tile's list, from the shortlist.
    __device__ void refine() {
        const EligibleBlocks eligible = block_select::eligible_blocks(params, tile);
        const BlockSet shortlist = eligible_of({scratch.shortlist, smem.shortlisted}, eligible);
        int32_t* list = params.block_indices + tile.index * params.max_blocks;
        const PooledRows pooled = PooledRows::of_tile(tile);
        const bool by_keys = params.refinement() == Refinement::kKeys;
        const int keep = static_cast<int>(params.head_blocks(tile.kv_head));
        const bool chooses = eligible.count() > keep;
        const BlockSet walked = walk(shortlist);
        for (int row = 0; chooses && keep > 0 && row < pooled.rows; row += kCtaRows) {
            units.load_pooled(pooled, row);
            // Against keys a unit counts as many times as it has keys.
            find_norm(kShortUnits, walked, row, by_keys ? logf(kShortUnits.keys) : 0.0f);
            find_masses(refinement_level(params.refinement()), shortlist, row, /*hottest=*/false);
        }
        const BlockSet taken = {list, choose(shortlist.blocks, shortlist.count, keep, params.top_p,
                                             list, params.max_blocks)};
        if (threadIdx.x == 0) params.block_counts[tile.index] = taken.count;
        if (!params.omitted_mass_estimate) return;
        if (!chooses) return write_estimates(pooled, 0.0f);
        const RangeBlocks ranges(tile.ranges(params.problem), tile.span());
        auto left = [&](int block) { return !ranges.contains(block) && !taken.contains(block); };
        for (int row = 0; row < pooled.rows; row += kCtaRows) {
            units.load_pooled(pooled, row);
            if (by_keys) raise_to_keys(pooled, walked, row, left);
            estimate(Estimate::kRefined, pooled, refinement_level(params.refinement()), walked, row,
                     left);
        }
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    block_select_simt_kernel(const __grid_constant__ BlockSelectParams params,
                             const __grid_constant__ int64_t num_scan_tiles) {
    extern __shared__ __align__(16) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<SelectSmem*>(smem_bytes);
    const Problem& problem = params.problem;
    const int dim = summary_dim(params.selector, static_cast<int>(problem.head_dim));
    const int64_t blocks = num_blocks(problem.kv_len);
    const bool refines = params.refinement() != Refinement::kNone;
    const int tiles = refines ? scan_tiles(params.selector, problem.kv_len) : 0;
    for (int64_t index = blockIdx.x; index < num_scan_tiles; index += gridDim.x) {
        // First the scan tile, then the tiles that its shortlist is for.
        for (int step = 0; step <= tiles; ++step) {
            __syncthreads();  // everyone is done with the previous tile
            Tile tile = Tile::longest_first(
                problem, index, scan_positions(params.selector, problem.group(), problem.kv_len));
            const int64_t head = tile.flat_kv_head(problem);
            if (step > 0) {
                const int64_t first = tile.first_query / tile_positions(problem.group());
                tile = Tile(problem, head, first + step - 1);
                if (tile.first_query >= tile.query_len) break;
            }
            const T* summaries = static_cast<const T*>(params.summaries) +
                                 head * summary_rows(params.selector, problem.kv_len) * dim;
            TileSelection<T> selection{params, smem, tile, Scratch(params.workspace, blocks),
                                       UnitSweep<T>{smem, params, tile, summaries, dim}};
            if (step > 0)
                selection.refine();
            else if (refines)
                selection.make_shortlist();
            else
                selection.make_list();
        }
    }
}

}  // namespace
}  // namespace simt

int64_t block_select_simt_workspace_bytes(const BlockSelectParams& params, int sm_count) {
    return simt::select_ctas(params, sm_count) * simt::Scratch::kArrays *
           num_blocks(params.problem.kv_len) * 4;
}

Status block_select_simt(const BlockSelectParams& params, const LaunchContext& context) {
    return with_element_type(params.problem.dtype, [&](auto tag) {
        return launch(simt::block_select_simt_kernel<typename decltype(tag)::type>,
                      "block_select_simt", {simt::select_ctas(params, context.sm_count)},
                      simt::kThreads, simt::select_smem_bytes(params), context, params,
                      simt::all_scan_tiles(params));
    });
}

}  // namespace condensate::kernels
