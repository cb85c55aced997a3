// Scoring and top-k of blocks in one kernel: persistent CTAs of four warps, four tiles at a time.
#pragma once

#include "kernels/block_select/second_look.h"
#include "kernels/block_select/top_blocks.h"

namespace condensate::kernels::block_select {

// One minus the kept share of each pooled query's mass, for the queries of its pool.
template <class Traits>
__device__ void write_estimate(const BlockSelectParams& params, const device::TileRows& tile,
                               const PooledRows& pooled, const RowNormaliser<Traits::kMTiles>& rows,
                               bool complete) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float kept = device::quad_sum(rows.kept[m][half]) * rows.inverse[m][half];
            bool none = complete || rows.inverse[m][half] == 0.0f;
            float omitted = none ? 0.0f : fmaxf(1.0f - kept, 0.0f);
            int row = 16 * m + 8 * half + lane / 4;
            int position = lane & 3;
            if (position >= pooled.size(tile, row)) continue;
            int64_t head = tile.batch * params.problem.query_heads + pooled.head(tile, row);
            params.omitted_mass_estimate[head * params.problem.query_len +
                                         pooled.first_query(tile, row) + position] = omitted;
        }
    }
}

struct TileList {
    int32_t* entries;
    int count;
};

// From the records in scratch to the tile's list. The true top blocks lie among those whose bound
// reaches the k-th mass. Round 0 looks at the blocks of the k largest bounds (and a few more): the
// k-th of their masses limits it from below. Round 1 looks at every other block whose bound reaches
// that limit. Round 2 only adds up what the listed blocks hold, for the estimate.
template <class Traits>
__device__ void select(const BlockSelectParams& params, SecondLook<Traits>& look, TileList& list) {
    const TileWork& work = look.sweep.work;
    const int lane = threadIdx.x & 31, budget = static_cast<int>(params.max_blocks);
    int* queue = look.sweep.smem.queue[threadIdx.x / 32];
    auto* histogram = reinterpret_cast<uint32_t*>(look.buffers());
    auto is_bound = [](uint32_t word, uint32_t* key) { return !((*key = word) & kExact); };
    auto is_exact = [](uint32_t word, uint32_t* key) {
        *key = word & ~kExact;
        return (word & kExact) && word != kIneligible;
    };
    uint32_t least =
        radix_threshold<16>(work.records, work.num_blocks, budget, histogram, is_bound).key;
#pragma unroll 1
    for (int round = 0; round < (work.track_kept ? 3 : 2); ++round) {
        look.accumulate_kept = round == 2;
        const int candidates = round == 2 ? list.count : work.num_blocks;
        int queued = 0;
        for (int first = 0; first < candidates; first += 32) {
            int block = first + lane;
            bool take = block < candidates;
            if (take && round < 2) {
                uint32_t word = work.records[block].word;
                take = !(word & kExact) && word >= least;
            }
            unsigned takers = __ballot_sync(0xffffffffu, take);
            if (take) {
                queue[queued + __popc(takers & ((1u << lane) - 1))] =
                    round == 2 ? list.entries[block] : block;
            }
            queued += __popc(takers);
            __syncwarp();
            if (queued > Traits::kQueueBlocks - 32 || (queued > 0 && first + 32 >= candidates)) {
                look.run(queue, queued);
                queued = 0;
            }
        }
        if (round == 2) break;
        Threshold mass =
            radix_threshold<0>(work.records, work.num_blocks, budget, histogram, is_exact);
        least = mass.key;
        if (round == 0) continue;
        auto rank = [&](uint32_t word) {
            uint32_t key;
            if (!is_exact(word, &key)) return 0;
            return key > mass.key ? 2 : key == mass.key ? 1 : 0;
        };
        list.count = write_list(work.records, work.num_blocks, mass.ties, rank, list.entries,
                                params.max_blocks);
        __syncwarp();  // the list is written
    }
}

template <class Traits>
__device__ int count_eligible(const TileWork& work) {
    int count = 0;
    for (int first = 0; first < work.num_blocks; first += 32) {
        int block = first + (threadIdx.x & 31);
        bool eligible = block < work.num_blocks && is_eligible(work.ranges, work.span, block);
        count += __popc(__ballot_sync(0xffffffffu, eligible));
    }
    return count;
}

__device__ __forceinline__ int reachable_blocks(const Ranges& r, int64_t last_position) {
    int64_t keys = r.causal ? min_i64(last_position + 1, r.kv_len) : r.kv_len;
    return keys > 0 ? static_cast<int>(ceil_div(keys, kBlockKeys)) : 0;
}

// Work item = four consecutive tiles of a KV head; items run longest first within a head.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kCtasPerSm)
    block_select_kernel(const __grid_constant__ BlockSelectParams params) {
    using T = typename Traits::T;
    extern __shared__ __align__(128) char smem_bytes[];
    auto& smem = *reinterpret_cast<typename Traits::Smem*>(smem_bytes);

    const Problem& problem = params.problem;
    const Ranges ranges = problem.ranges();
    const int warp = threadIdx.x / 32;
    const int unit_keys = kBlockKeys / Traits::kUnitsPerBlock;
    const int64_t tiles = num_tiles(problem.query_len, problem.group());
    const int64_t items_per_head = ceil_div(tiles, Traits::kWarps);
    const int64_t items = problem.batch * problem.kv_heads * items_per_head;
    const int64_t units = summary_units(params.selector, problem.kv_len);
    const int summary_dim =
        condensate::summary_dim(params.selector, static_cast<int>(problem.head_dim));
    const int64_t scratch_blocks = num_blocks(problem.kv_len);
    const float scale_log2 = problem.scale * 1.44269504088896341f;

    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t head = item / items_per_head;
        const int64_t first_tile = (items_per_head - 1 - item % items_per_head) * Traits::kWarps;
        const bool exists = first_tile + warp < tiles;
        const int64_t tile_in_head = exists ? first_tile + warp : tiles - 1;
        const device::TileRows tile(problem, head, tile_in_head);
        const PooledRows pooled(tile);
        TileWork work;
        work.ranges = ranges;
        work.span = tile.span();
        work.num_blocks = exists ? reachable_blocks(ranges, work.span.last) : 0;
        char* scratch = static_cast<char*>(params.workspace) +
                        (int64_t{blockIdx.x} * Traits::kWarps + warp) *
                            tile_scratch_bytes(scratch_blocks, Traits::kChunkBlocks);
        work.records = reinterpret_cast<BlockRecord*>(scratch);
        work.references = reinterpret_cast<float*>(work.records + record_slots(scratch_blocks));
        work.track_kept = params.omitted_mass_estimate != nullptr;
        const int eligible = count_eligible<Traits>(work);
        const bool complete = eligible <= params.max_blocks;

        Sweep<Traits> sweep(smem, work, scale_log2, tile, pooled, unit_keys);
        RowNormaliser<Traits::kMTiles> rows;
        const T* units_gmem = static_cast<const T*>(params.summaries) + head * units * summary_dim;
        SecondLook<Traits> look{sweep, rows, units_gmem, summary_dim, false};

        // A barrier that also tells whether any of the four tiles has to choose.
        if (__syncthreads_or(!complete)) {
            load_pooled_queries<Traits>(sweep.query_smem(), params, tile, pooled);
            int64_t last_tile = min_i64(first_tile + Traits::kWarps, tiles) - 1;
            TileSpan last_span =
                tile_span(last_tile, tile.positions, problem.query_len, problem.kv_len);
            int chunks = static_cast<int>(
                ceil_div(reachable_blocks(ranges, last_span.last), Traits::kChunkBlocks));
            sweep.run(rows, units_gmem, units, summary_dim, chunks);
        } else {
            for (int block = threadIdx.x & 31; block < work.num_blocks; block += 32)
                work.records[block].word = is_eligible(ranges, work.span, block) ? 0 : kIneligible;
        }
        __syncwarp();  // the warp's own words in scratch are written
        if (exists) {
            TileList list = {params.block_indices + tile.tile_index * params.max_blocks, 0};
            if (complete || params.max_blocks == 0) {
                auto rank = [](uint32_t word) { return word == kIneligible ? 0 : 2; };
                list.count = write_list(work.records, complete ? work.num_blocks : 0, 0, rank,
                                        list.entries, params.max_blocks);
            } else {
                select<Traits>(params, look, list);
            }
            if ((threadIdx.x & 31) == 0) params.block_counts[tile.tile_index] = list.count;
            if (params.omitted_mass_estimate)
                write_estimate<Traits>(params, tile, pooled, rows, complete);
        }
        __syncthreads();  // queries and stages are free for the next item
    }
}

}  // namespace condensate::kernels::block_select
