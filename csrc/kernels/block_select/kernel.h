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
            float kept = device::quad_sum(rows.kept[m][half]);
            float sum = rows.sum[m][half];
            float omitted = complete || sum == 0.0f ? 0.0f : fmaxf(1.0f - kept / sum, 0.0f);
            int row = 16 * m + 8 * half + lane / 4;
            int position = lane & 3;
            if (position >= pooled.size(tile, row)) continue;
            int64_t head = tile.batch * params.problem.query_heads + pooled.head(tile, row);
            params.omitted_mass_estimate[head * params.problem.query_len +
                                         pooled.first_query(tile, row) + position] = omitted;
        }
    }
}

// From the bounds in scratch to the tile's list.
template <class Traits>
__device__ int select(const BlockSelectParams& params, SecondLook<Traits>& look, int eligible,
                      int32_t* list) {
    const TileWork& work = look.sweep.work;
    const int budget = static_cast<int>(params.max_blocks);
    auto is_eligible_word = [](uint32_t word) { return word == kIneligible ? 0 : 2; };
    auto is_bound = [](uint32_t word, uint32_t* key) { return !((*key = word) & kExact); };
    auto is_exact = [](uint32_t word, uint32_t* key) {
        *key = word & ~kExact;
        return (word & kExact) && word != kIneligible;
    };
    int taken;
    if (eligible <= budget) {
        taken = write_list(work.records, work.num_blocks, 0, is_eligible_word, list, params.max_blocks);
    } else if (budget == 0) {
        taken = 0;
    } else {
        auto* histogram = reinterpret_cast<uint32_t*>(look.buffers());
        // The true top blocks lie among those whose bound reaches the k-th mass; the blocks of the
        // k largest bounds give a lower limit for it.
        Threshold bound = radix_threshold(work.records, work.num_blocks, budget, histogram, is_bound);
        look.run_where([&](uint32_t word) { return !(word & kExact) && word >= bound.key; });
        Threshold mass = radix_threshold(work.records, work.num_blocks, budget, histogram, is_exact);
        float least = __uint_as_float(mass.key);
        int looked = look.run_where([&](uint32_t word) {
            return !(word & kExact) && __uint_as_float(word) >= least;
        });
        if (looked > 0)
            mass = radix_threshold(work.records, work.num_blocks, budget, histogram, is_exact);
        auto rank = [&](uint32_t word) {
            uint32_t key;
            if (!is_exact(word, &key)) return 0;
            return key > mass.key ? 2 : key == mass.key ? 1 : 0;
        };
        taken = write_list(work.records, work.num_blocks, mass.ties, rank, list, params.max_blocks);
    }
    return taken;
}

// Adds the listed blocks' weights to the rows' kept sums.
template <class Traits>
__device__ void add_listed(SecondLook<Traits>& look, const int32_t* list, int count) {
    int* queue = look.sweep.smem.queue[threadIdx.x / 32];
    look.accumulate_kept = true;
    for (int first = 0; first < count; first += Traits::kQueueBlocks) {
        int entries = min(count - first, Traits::kQueueBlocks);
        for (int i = threadIdx.x & 31; i < entries; i += 32) queue[i] = list[first + i];
        __syncwarp();
        look.run(queue, entries);
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
    const int summary_dim = condensate::summary_dim(params.selector, static_cast<int>(problem.head_dim));
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
        work.checkpoints = reinterpret_cast<float*>(work.records + scratch_blocks);
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
            int32_t* list = params.block_indices + tile.tile_index * params.max_blocks;
            int count = select<Traits>(params, look, eligible, list);
            if ((threadIdx.x & 31) == 0) params.block_counts[tile.tile_index] = count;
            if (params.omitted_mass_estimate) {
                if (!complete) add_listed(look, list, count);
                write_estimate<Traits>(params, tile, pooled, rows, complete);
            }
        }
        __syncthreads();  // queries and stages are free for the next item
    }
}

}  // namespace condensate::kernels::block_select
