// The scan: averaged queries against every visible unit. Persistent CTAs of eight (or four) warps;
// as many scan tiles of a KV head at a time, a warp each, share the units that are loaded. One pass
// finds each row's softmax sum, the next the masses of blocks, of which the largest are kept. All
// tiles in this file are scan tiles.
#pragma once

#include "condensate/params.h"
#include "kernels/block_select/common/eligible.h"
#include "kernels/block_select/common/outside_share.h"
#include "kernels/block_select/common/score_chunks.h"
#include "kernels/block_select/common/top_blocks.h"

namespace condensate::kernels::block_select {

// What a scan makes: shortlists, or the lists themselves.
struct ScanOutput {
    bool shortlists;
    int32_t* indices;  // [scan tiles of all heads, width]
    int32_t* counts;   // [scan tiles of all heads]
    int64_t width;
    // Per resident warp: capacity masses, capacity blocks; not used up to kSmemWindow.
    uint32_t* candidates;
    int64_t capacity;
    int tiles_per_head;  // scan tiles
    int items;           // of a scan tile a warp
};

// Entries of an ascending list as bits of consecutive ranges of at most 64 blocks.
struct ListCursor {
    const int32_t* list;
    int count;
    int next = 0;

    // Bit i: is block first + i listed? The whole warp calls it, ranges ascending.
    __device__ uint64_t bits(int first, int blocks) {
        constexpr unsigned kAll = 0xffffffffu;
        uint32_t low = 0, high = 0;
        for (;;) {
            int i = next + static_cast<int>(threadIdx.x & 31);
            int entry = i < count ? list[i] : INT_MAX;
            bool inside = entry < first + blocks;
            if (inside && entry - first < 32) low |= 1u << (entry - first);
            if (inside && entry - first >= 32) high |= 1u << (entry - first - 32);
            int taken = __popc(__ballot_sync(kAll, inside));
            next += taken;
            if (taken < 32) break;
        }
        low = __reduce_or_sync(kAll, low);
        high = __reduce_or_sync(kAll, high);
        return uint64_t{high} << 32 | low;
    }
};

// What a warp keeps of its tile in shared memory.
struct TileState {
    Tile tile;
    EligibleBlocks eligible;
    TopBlocks::Window window;
    int32_t* list;
    int blocks;  // that the tile reaches; 0: nothing to score
    int round;   // of the CTA
};

template <class Traits>
struct ScanSmem : Traits::Smem {
    TileState tile[Traits::kWarps];
    uint32_t window[Traits::kWarps][2 * kSmemWindow];  // masses and blocks, where they fit
    const typename Traits::T* summaries;               // of the KV head
    int head;                                          // of all batches
    int blocks;                                        // that some tile of the CTA reaches
};

// A warp's work on one tile.
template <class Traits>
struct TileScan {
    using T = typename Traits::T;
    using Layout = ChunkLayout<Traits::kBlockUnits, Traits::kWgmma>;
    using Scores = typename HeldRows<Traits>::Scores;
    static constexpr int kMTiles = Traits::kMTiles;

    ScanSmem<Traits>& smem;
    const BlockSelectParams& params;
    const typename Traits::Maps& maps;
    uint32_t& streamed;  // chunks so far
    float scale_log2;
    HeldRows<Traits> rows;

    __device__ const TileState& state() const { return smem.tile[threadIdx.x / 32]; }

    // Scores the level's units chunk by chunk: body(scores, first block of the chunk).
    template <class Body>
    __device__ __forceinline__ void sweep(UnitLevel level, Body&& body) {
        const Ranges ranges = state().tile.ranges(params.problem);
        const int seen_by_all = rows.seen_by_all(ranges, level.keys);
        const int chunk_blocks = kChunkUnits / level.per_block;
        const int reached = (state().blocks + chunk_blocks - 1) / chunk_blocks;
        auto idle = [&](int step) { return step >= reached; };
        auto look = [&](Scores& s, int step) {
            const int first_unit = step * kChunkUnits;
            if (first_unit + kChunkUnits > seen_by_all) {
                rows.template mask<Traits::kBlockUnits>(s, ranges, level.keys, [&](int v) {
                    return first_unit + Layout::block(v) * Traits::kBlockUnits;
                });
            }
            body(s, step * chunk_blocks);
        };
        score_chunks<Traits, Traits::kPanels>(smem, rows, streamed,
                                              (smem.blocks + chunk_blocks - 1) / chunk_blocks,
                                              loader(level), idle, look);
    }

    // What starts copying a level's chunks; a box is a panel.
    __device__ __forceinline__ auto loader(UnitLevel level) {
        if constexpr (Traits::kWgmma) {
            static_assert(Traits::kPanels <= Traits::kWarps, "a warp starts one box");
            return [this, level](int step, uint32_t stage_smem, uint32_t landed_smem, int panel) {
                if ((threadIdx.x & 31) != 0) return;
                const bool coarse = level.keys == kCoarseUnits.keys;
                ptx::tensor_load_4d(stage_smem + panel * Traits::kPanelBytes,
                                    coarse ? &maps.coarse_chunk : &maps.short_chunk, landed_smem,
                                    panel * 64, level.first_row,
                                    step * (kChunkUnits / level.per_block), smem.head);
            };
        } else {
            const int dim =
                summary_dim(Traits::kSelector, static_cast<int>(params.problem.head_dim));
            const LevelStream<Traits> stream(
                smem.summaries, level, rows_per_block(Traits::kSelector),
                static_cast<int>(num_blocks(params.problem.kv_len)), dim);
            return [this, stream](int step, int stage) {
                stream.template copy<Traits::kBlockUnits>(ptx::smem_address(smem.stages[stage]),
                                                          step);
            };
        }
    }

    __device__ __forceinline__ void find_norm() {
        device::OnlineSoftmax<kMTiles> softmax;
        sweep(scan_levels(Traits::kSelector).norm, [&](Scores& s, int) {
            float rescale[kMTiles][2];
            softmax.raise(s, scale_log2, rescale);
            softmax.weigh(s, scale_log2);
        });
        rows.normalise(softmax);
    }

    static __device__ __forceinline__ float mass_of(float log2_weight) {
        return finite_mass(ptx::exp2_approx(log2_weight));
    }

    __device__ __forceinline__ void find_top(TopBlocks& top) {
        const int lane = threadIdx.x & 31;
        float waiting = 0.0f;  // of units in order: chunks fill a quarter of the lanes each
        sweep(scan_levels(Traits::kSelector).mass, [&](Scores& s, int first_block) {
            constexpr int kBlocks = Layout::kBlocks;
            const float2 hottest = hottest_units<Traits::kBlockUnits>(rows, s, scale_log2);
            if constexpr (Layout::kInOrder) {
                const int quarter = first_block / kBlocks % 4;
                if (lane % 4 == quarter) waiting = hottest.x;
                if (quarter < 3 && first_block + kBlocks < state().blocks) return;
                const int block = first_block + (lane % 4 - quarter) * kBlocks + lane / 4;
                top.add((lane % 4 <= quarter) & state().eligible.contains(block), mass_of(waiting),
                        block);
            } else {
                const EligibleBlocks eligible = state().eligible;
                const int block = first_block + lane;
                top.add(lane < kBlocks && eligible.contains(block), mass_of(hottest.x), block);
                if constexpr (kBlocks == 64)
                    top.add(eligible.contains(block + 32), mass_of(hottest.y), block + 32);
            }
            top.make_room(first_block + kBlocks);
        });
    }

    // The estimate; where shortlists are made what their refinement turns into it, the log2 of the
    // sum outside the scan tile's walk.
    __device__ __forceinline__ void estimate(const ScanOutput& output, int list_count);
};

// Writes a pooled row's value to the estimates of the queries of its pool.
template <int kMTiles, class Value>
__device__ __forceinline__ void write_estimates(const BlockSelectParams& params, const Tile& tile,
                                                Value&& value) {
    const PooledRows pooled = PooledRows::of_scan(params, tile);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = value(m, half);
            int row = 16 * m + 8 * half + static_cast<int>(threadIdx.x & 31) / 4;
            const int size = pooled.size(row);
            if (size == 0) continue;
            float* first = params.omitted_mass_estimate + pooled.flat_row(params.problem, row);
            for (int i = threadIdx.x & 3; i < size; i += 4) first[i] = x;
        }
    }
}

template <class Traits>
__device__ __forceinline__ void TileScan<Traits>::estimate(const ScanOutput& output,
                                                           int list_count) {
    ListCursor listed{state().list, list_count};
    const RangeBlocks ranges(state().tile.ranges(params.problem), state().tile.span());
    OutsideShare<Traits> shares;
    sweep(scan_levels(Traits::kSelector).mass, [&](Scores& s, int first_block) {
        const uint64_t inside = listed.bits(first_block, Layout::kBlocks);
        shares.template add<Layout>(s, scale_log2, [&](int v) {
            const int block = Layout::block(v);
            return !(inside >> block & 1) && !ranges.contains(first_block + block);
        });
    });
    shares.reduce();
    if (state().blocks == 0) return;
    write_estimates<kMTiles>(params, state().tile, [&](int m, int half) {
        if (!output.shortlists) return shares.share(m, half);
        return log2f(shares.outside[m][half]) + shares.reference(m, half);
    });
}

// Prepares the warp's tile, if there is one. Returns whether it must be scored; if not, its list is
// complete.
template <class Traits>
__device__ __forceinline__ bool begin_tile(TileState& state_smem, uint32_t* window_smem,
                                           const BlockSelectParams& params,
                                           const ScanOutput& output, const Tile& tile, bool exists,
                                           int round) {
    const int lane = threadIdx.x & 31;
    const EligibleBlocks eligible = eligible_blocks(params, tile);
    int32_t* list = output.indices + tile.index * output.width;
    const int keep =
        static_cast<int>(output.shortlists ? output.width : params.head_blocks(tile.kv_head));
    const bool chooses = exists && eligible.count() > keep;
    const bool scores = chooses && (keep > 0 || params.omitted_mass_estimate);
    __syncwarp();  // nobody reads the previous tile's state any more
    if (lane == 0) {
        int64_t resident_warp = int64_t{blockIdx.x} * Traits::kWarps + threadIdx.x / 32;
        int capacity = static_cast<int>(output.capacity);
        uint32_t* masses = capacity <= kSmemWindow
                               ? window_smem
                               : output.candidates + resident_warp * 2 * output.capacity;
        state_smem = {tile,
                      eligible,
                      {masses, reinterpret_cast<int32_t*>(masses + capacity), capacity, keep},
                      list,
                      scores ? reachable_blocks(tile.ranges(params.problem), tile.span()) : 0,
                      round};
    }
    __syncwarp();
    if (exists && !scores) {
        if (chooses)
            pad_list(list, 0, output.width);
        else
            write_all(eligible, list, output.width);
        if (lane == 0) output.counts[tile.index] = chooses ? 0 : eligible.count();
        if (params.omitted_mass_estimate) {
            float nothing = output.shortlists ? -INFINITY : 0.0f;
            write_estimates<Traits::kMTiles>(params, tile, [&](int, int) { return nothing; });
        }
    }
    return scores;
}

// Work item = consecutive tiles of a KV head, one a warp. Items are dealt out longest first, back
// and forth, so that every CTA gets as much.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    block_scan_kernel(const __grid_constant__ BlockSelectParams params,
                      const __grid_constant__ ScanOutput output,
                      const __grid_constant__ typename Traits::Maps maps) {
    using T = typename Traits::T;
    extern __shared__ __align__(1024) char smem_bytes[];
    auto& smem = *reinterpret_cast<ScanSmem<Traits>*>(smem_bytes);

    const Problem& problem = params.problem;
    const int warp = threadIdx.x / 32;
    const int tiles = output.tiles_per_head;
    uint32_t streamed = 0;
    init_stages<Traits>(smem);
    const int items_per_head = (tiles + Traits::kWarps - 1) / Traits::kWarps;

    for (int round = 0;; round = smem.tile[warp].round + 1) {
        const int place = static_cast<int>(round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        const int item = round * static_cast<int>(gridDim.x) + place;
        if (item >= output.items) break;
        const int heads = output.items / items_per_head;
        const int head = item % heads;
        const int first_tile = (items_per_head - 1 - item / heads) * Traits::kWarps;
        const bool exists = first_tile + warp < tiles;
        const Tile tile(problem, head, exists ? first_tile + warp : tiles - 1,
                        scan_positions(Traits::kSelector, problem.group(), problem.kv_len));
        const bool scores = begin_tile<Traits>(smem.tile[warp], smem.window[warp], params, output,
                                               tile, exists, round);
        if (!__syncthreads_or(scores)) continue;

        if (threadIdx.x == 0) {
            int dim = summary_dim(Traits::kSelector, static_cast<int>(problem.head_dim));
            smem.head = head;
            smem.summaries = static_cast<const T*>(params.summaries) +
                             head * summary_rows(Traits::kSelector, problem.kv_len) * dim;
            TileSpan last = tile_span(min(first_tile + Traits::kWarps, tiles) - 1, tile.positions,
                                      tile.query_len, tile.kv_len);
            smem.blocks = reachable_blocks(tile.ranges(problem), last);
        }
        TileScan<Traits> scan{
            smem, params, maps, streamed, problem.scale * device::kLog2E, HeldRows<Traits>(smem)};
        const PooledRows pooled = PooledRows::of_scan(params, tile);
        const uint32_t rows_smem = ptx::smem_address(smem.stages);
        constexpr bool kShares = Traits::kSelector == Selector::kBlock;
        if (!kShares || pooled.pool <= kQueryPool)
            load_pooled_queries<Traits, kQueryPool>(rows_smem, params, pooled, 0);
        else if constexpr (kShares)
            load_pooled_queries<Traits, kQueryPool, true>(rows_smem, params, pooled, 0);
        scan.rows.hold([&](int row) {
            row %= Traits::kWarpRows;
            return scores && row < pooled.rows ? static_cast<int>(pooled.last_position(row))
                                               : kNoRow;
        });
        if constexpr (Traits::kWgmma) ptx::fence_async_proxy();
        __syncthreads();  // all rows are in registers: the stages are free

        scan.find_norm();
        int count = 0;
        if (output.width > 0) {
            TopBlocks top(
                smem.tile[warp].window, smem.histogram[warp],
                TileScan<Traits>::Layout::kInOrder ? lanes_before_by_quad_lane() : lanes_before());
            scan.find_top(top);
            const float top_p = output.shortlists ? 0.0f : params.top_p;
            if (scores) count = top.store(top_p, smem.tile[warp].list, output.width);
        }
        if (scores && (threadIdx.x & 31) == 0) output.counts[smem.tile[warp].tile.index] = count;
        if (params.omitted_mass_estimate) scan.estimate(output, count);
    }
}

}  // namespace condensate::kernels::block_select
