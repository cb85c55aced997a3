// Block selection on CUDA cores: one CTA per scan tile, a unit per lane, four rows per warp, 32
// rows at a time. Every pass is a sweep over the units of one level of some blocks.
#include "device/block_walk.h"
#include "kernels/block_select/eligible.h"
#include "kernels/launch.h"
#include "kernels/simt/unit_sweep.h"

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
    const device::TileRows& tile;
    Scratch scratch;
    UnitSweep<T> units;  // of the tile's KV head
    Lane lane = {};

    // Softmax sums of the warp's rows, which are rows first_row and on of the tile.
    __device__ __forceinline__ void find_norm(UnitLevel level, BlockSet set, int first_row) {
        LaneSum sums[kWarpRows];
        units.sweep(level, set, [&](const float (&score)[kWarpRows], int) {
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) sums[r].add(score[r]);
        });
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            float lse = sums[r].over_warp().lse();
            if (lane.lane == 0) smem.norm[first_row + lane.row(r)] = isfinite(lse) ? lse : INFINITY;
        }
        __syncwarp();
    }

    // Sum over the lanes of a block of what they hold of a row's softmax sum, or the hottest's.
    __device__ __forceinline__ float block_mass(float score, int row, int per_block,
                                                bool hottest = false) const {
        float mass = expf(score - smem.norm[row]);
        for (int offset = 1; offset < per_block; offset *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, mass, offset);
            mass = hottest ? fmaxf(mass, other) : mass + other;
        }
        return block_select::finite_mass(mass);
    }

    // scratch.masses[i]: of the set's i-th block, the largest over the rows so far.
    __device__ __forceinline__ void find_masses(UnitLevel level, BlockSet set, int first_row,
                                                bool hottest) {
        units.sweep(level, set, [&](const float (&score)[kWarpRows], int place) {
            float largest = 0.0f;
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                const int row = first_row + lane.row(r);
                largest = fmaxf(largest, block_mass(score[r], row, level.per_block, hottest));
            }
            if (lane.lane % level.per_block == 0)
                smem.warp_mass[lane.warp][lane.lane / level.per_block] = largest;
            __syncthreads();
            // The sweep's barriers keep the next units' masses from these reads.
            int slot = static_cast<int>(threadIdx.x);
            int i = place - lane.lane / level.per_block + slot;
            if (slot >= kTileKeys / level.per_block || i >= set.count) return;
            float mass = first_row == 0 ? 0.0f : __uint_as_float(scratch.masses[i]);
            for (int warp = 0; warp < kWarps; ++warp)
                mass = fmaxf(mass, smem.warp_mass[warp][slot]);
            scratch.masses[i] = __float_as_uint(mass);
        });
        __syncthreads();
    }

    // The `keep` blocks of largest mass of the candidates; returns how many. All threads call it.
    __device__ int choose(const int32_t* candidates, int count, int keep, int32_t* list,
                          int64_t width) {
        if (threadIdx.x < 32) {
            int taken = min(count, keep);
            if (count <= keep) {  // without masses
                for (int i = lane.lane; i < count; i += 32) list[i] = candidates[i];
            } else if (keep > 0) {
                block_select::Threshold threshold =
                    block_select::radix_threshold(scratch.masses, count, keep, smem.histogram);
                block_select::write_list(scratch.masses, candidates, count, threshold, list,
                                         nullptr);
            }
            block_select::pad_list(list, taken, width);
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

    // Softmax sums, relative to exp(norm), of candidates that are not in `inside`: the pooled
    // estimate, or for `block` the log of a sum that the refinement will need.
    __device__ __forceinline__ void estimate_pooled(const PooledRows& pooled, UnitLevel level,
                                                    BlockSet candidates, BlockSet inside,
                                                    int first_row) {
        float outside[kWarpRows] = {};
        units.sweep(level, candidates, [&](const float (&score)[kWarpRows], int place) {
            bool counts = place < candidates.count && !inside.contains(candidates.at(place));
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                float mass = block_mass(score[r], first_row + lane.row(r), level.per_block);
                bool first_lane = lane.lane % level.per_block == 0;
                outside[r] += counts && first_lane ? mass : 0.0f;
            }
        });
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            int row = first_row + lane.row(r);
            float sum = warp_sum(outside[r]);
            bool refines = params.selector == Selector::kBlock;
            float log_sum = sum > 0.0f ? logf(fminf(sum, FLT_MAX)) + smem.norm[row] : -INFINITY;
            int64_t first = pooled.flat_row(row, params.problem.query_heads);
            for (int i = lane.lane; i < pooled.size(row); i += 32)
                params.omitted_mass_estimate[first + i] = refines ? log_sum : fminf(sum, 1.0f);
        }
    }

    // Turns the estimates, logs of pooled sums R over blocks outside the scan tile's walk, into
    // shares.
    __device__ __forceinline__ void estimate_refined(const PooledRows& pooled, UnitLevel level,
                                                     const EligibleBlocks& eligible,
                                                     BlockSet walked, BlockSet listed,
                                                     int first_row) {
        LaneSum all[kWarpRows], omitted[kWarpRows];
        units.sweep(level, walked, [&](const float (&score)[kWarpRows], int place) {
            int block = place < walked.count ? walked.at(place) : -1;
            bool counts = eligible.contains(block) && !listed.contains(block);
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
            float* at =
                params.omitted_mass_estimate + pooled.flat_row(row, params.problem.query_heads);
            float reference = finite_reference(sum.largest);
            // A middle unit stands for four fine ones. The bound keeps inf / inf away.
            float unseen = fminf(4.0f * expf(*at - reference), 1e30f);
            float share = (part.sum * expf(part.largest - reference) + unseen) / (sum.sum + unseen);
            share = fminf(fmaxf(share, 0.0f), 1.0f);  // 0 for NaN
            for (int i = 0; i < pooled.size(row); ++i) at[i] = share;
        }
    }

    // The blocks that the attention would walk, into scratch.walked.
    __device__ BlockSet walk(BlockSet list) {
        if (threadIdx.x == 0) {
            device::BlockWalk walk(params.problem.ranges(), tile.span(), list.blocks, list.count,
                                   list.count);
            smem.count = 0;
            for (int block; (block = walk.next().block) != INT_MAX;)
                scratch.walked[smem.count++] = block;
        }
        return {scratch.walked, shared_count()};
    }

    // The scan's list, of `width` blocks.
    __device__ BlockSet scan(int32_t* list, int64_t width) {
        const EligibleBlocks eligible(params.problem.ranges(), tile.span());
        const PooledRows pooled = PooledRows::of_scan(params, tile);
        const ScoringLevels levels = scan_levels(params.selector);
        const BlockSet reachable = {nullptr,
                                    reachable_blocks(params.problem.ranges(), tile.span())};
        const BlockSet candidates = {scratch.eligible, eligible.count()};
        for (int i = threadIdx.x; i < candidates.count; i += kThreads)
            scratch.eligible[i] = eligible.at(i);
        __syncthreads();
        const bool scores = candidates.count > width;
        for (int row = 0; scores && row < pooled.rows; row += kCtaRows) {
            units.load_pooled(pooled, row);
            find_norm(levels.norm, reachable, row);
            find_masses(levels.mass, candidates, row, /*hottest=*/true);
        }
        const int keep = static_cast<int>(min_i64(width, candidates.count));
        BlockSet taken = {list, choose(candidates.blocks, candidates.count, keep, list, width)};
        if (params.omitted_mass_estimate) {
            const bool refines = params.selector == Selector::kBlock;
            const BlockSet inside = refines ? walk(taken) : taken;
            for (int row = 0; row < pooled.rows; row += kCtaRows) {
                units.load_pooled(pooled, row);
                if (!scores && lane.lane < kWarpRows)
                    smem.norm[row + lane.row(lane.lane)] = INFINITY;  // nothing is left out
                __syncwarp();
                estimate_pooled(pooled, levels.mass, scores ? candidates : BlockSet{nullptr, 0},
                                inside, row);
            }
        }
        return taken;
    }

    __device__ void make_list() {
        BlockSet taken =
            scan(params.block_indices + tile.tile_index * params.max_blocks, params.max_blocks);
        if (threadIdx.x == 0) params.block_counts[tile.tile_index] = taken.count;
    }

    // Of a scan tile.
    __device__ void make_shortlist() {
        const int64_t blocks = num_blocks(params.problem.kv_len);
        BlockSet taken =
            scan(scratch.shortlist, min_i64(shortlist_width(params.max_blocks), blocks));
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
        const EligibleBlocks eligible(params.problem.ranges(), tile.span());
        const BlockSet shortlist = eligible_of({scratch.shortlist, smem.shortlisted}, eligible);
        int32_t* list = params.block_indices + tile.tile_index * params.max_blocks;
        const PooledRows pooled = PooledRows::of_refinement(tile);
        const ScoringLevels levels = kRefinementLevels;
        const int keep = static_cast<int>(min_i64(params.max_blocks, eligible.count()));
        const bool scores = eligible.count() > params.max_blocks;
        const BlockSet walked = walk(shortlist);
        for (int row = 0; scores && row < pooled.rows; row += kCtaRows) {
            units.load_pooled(pooled, row);
            find_norm(levels.norm, walked, row);
            find_masses(levels.mass, shortlist, row, /*hottest=*/false);
        }
        BlockSet taken = {list,
                          choose(shortlist.blocks, shortlist.count, keep, list, params.max_blocks)};
        if (threadIdx.x == 0) params.block_counts[tile.tile_index] = taken.count;
        for (int row = 0; params.omitted_mass_estimate && row < pooled.rows; row += kCtaRows) {
            units.load_pooled(pooled, row);
            estimate_refined(pooled, levels.mass, eligible, walked, taken, row);
        }
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    block_select_kernel(const __grid_constant__ BlockSelectParams params,
                        const __grid_constant__ int64_t num_scan_tiles) {
    extern __shared__ __align__(16) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<SelectSmem*>(smem_bytes);
    const Problem& problem = params.problem;
    const int dim = summary_dim(params.selector, static_cast<int>(problem.head_dim));
    const int64_t blocks = num_blocks(problem.kv_len);
    const bool refines = params.selector == Selector::kBlock;
    const int tiles = refines ? scan_tiles(params.selector, problem.kv_len) : 0;
    for (int64_t index = blockIdx.x; index < num_scan_tiles; index += gridDim.x) {
        // First the scan tile, then the tiles that its shortlist is for.
        for (int step = 0; step <= tiles; ++step) {
            __syncthreads();  // everyone is done with the previous tile
            device::TileRows tile = device::TileRows::from_index(
                problem, index, scan_positions(params.selector, problem.group(), problem.kv_len));
            const int64_t head = tile.flat_kv_head(problem);
            if (step > 0) {
                const int64_t first = tile.first_query / tile_positions(problem.group());
                tile = device::TileRows(problem, head, first + step - 1);
                if (tile.first_query >= problem.query_len) break;
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
        return launch(simt::block_select_kernel<typename decltype(tag)::type>, "block_select_simt",
                      {simt::select_ctas(params, context.sm_count)}, simt::kThreads,
                      simt::select_smem_bytes(params), context, params,
                      simt::all_scan_tiles(params));
    });
}

}  // namespace condensate::kernels
