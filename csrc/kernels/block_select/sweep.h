// First look: every unit is scored once. Masses need the rows' final normalisers, which are only
// known at the end; so each block leaves its largest mass by a reference normaliser, per group of
// eight rows. Knowing how the references relate to the final normalisers turns those into upper
// bounds afterwards.
#pragma once

#include "condensate/params.h"
#include "device/mma_tile.h"
#include "kernels/block_select/masses.h"
#include "kernels/block_select/pooled_queries.h"

namespace condensate::kernels::block_select {

// Rows that share a bound: accumulator rows 16 m + 8 half .. + 7, mostly one head's.
constexpr int kRowGroups = 4;

// What scratch holds for one block of a tile.
union BlockRecord {
    uint2 running;  // during the sweep: four bfloat16 masses by the period's references
    uint32_t word;  // afterwards: see below
};
// Words, ordered as unsigned within each state. Sign clear: an upper bound of the mass (float
// bits). Sign set: the mass itself (float bits | kExact). kIneligible: may not be listed.
constexpr uint32_t kExact = 0x80000000u;
constexpr uint32_t kIneligible = 0xffffffffu;

// Steps that share a reference, the normaliser before the first of them: single steps at first,
// while normalisers still move fast, then 16.
CONDENSATE_HOST_DEVICE int period_of_step(int step) {
    constexpr int kSingle = 8, kLength = 16;
    return step < kSingle ? step : kSingle + (step - kSingle) / kLength;
}
// Records of a tile, rounded up so that what follows them is aligned to 16 bytes.
CONDENSATE_HOST_DEVICE int64_t record_slots(int64_t num_blocks) {
    return ceil_div(num_blocks, 2) * 2;
}
// Bytes of one tile's scratch: a record per block, 32 floats per period and for the end.
CONDENSATE_HOST_DEVICE int64_t tile_scratch_bytes(int64_t num_blocks, int chunk_blocks) {
    int64_t periods = 2 + period_of_step(static_cast<int>(ceil_div(num_blocks, chunk_blocks)));
    return record_slots(num_blocks) * static_cast<int64_t>(sizeof(BlockRecord)) +
           periods * 32 * static_cast<int64_t>(sizeof(float));
}

// What a warp knows of its tile.
struct TileWork {
    Ranges ranges;
    TileSpan span;
    int num_blocks;  // blocks any of its queries can reach; 0 for a tile past the end
    BlockRecord* records;
    float* references;  // [period][row]: log2 of the row's reference; the final normaliser last
    bool track_kept;    // sum the weights of blocks that need no selection
};

// Bounds get this much slack before a block is ruled out by its bound: they are rounded to bfloat16
// (2^-9), and the second look rounds differently.
constexpr float kBoundSlack = 1.01f;
constexpr float kLargestBound = FLT_MAX / 2;

// The order of chunks: attention sinks first and then back from the diagonal, where most mass lies,
// so that the normaliser is nearly final early and the bounds are tight.
__device__ __forceinline__ int chunk_of_step(int step, int chunks) {
    return step == 0 ? 0 : chunks - step;
}
__device__ __forceinline__ int step_of_chunk(int chunk, int chunks) {
    return chunk == 0 ? 0 : chunks - chunk;
}

template <class Traits>
struct Sweep {
    using T = typename Traits::T;
    using Blocks = LaneBlocks<Traits::kUnitsPerBlock, Traits::kNTiles>;
    using Rows = RowNormaliser<Traits::kMTiles>;
    static constexpr int kRegisterSteps = Traits::kQueriesInRegisters ? Traits::kDim / 16 : 1;

    typename Traits::Smem& smem;
    const TileWork& work;
    float scale_log2;
    int visible[Traits::kMTiles][2];  // units each of the lane's rows sees
    int all_visible;                  // units that every existing row of the tile sees
    uint32_t queries[kRegisterSteps][Traits::kMTiles][4];

    __device__ Sweep(typename Traits::Smem& smem, const TileWork& work, float scale_log2,
                     const device::TileRows& tile, const PooledRows& pooled, int unit_keys)
        : smem(smem), work(work), scale_log2(scale_log2) {
        int lane = threadIdx.x & 31;
        int least = INT_MAX;
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = 16 * m + 8 * half + lane / 4;
                bool exists = work.num_blocks > 0 && pooled.size(tile, row) > 0;
                visible[m][half] =
                    exists ? visible_units(work.ranges, pooled.last_position(tile, row), unit_keys)
                           : 0;
                least = min(least, visible[m][half]);
            }
        }
        all_visible = __reduce_min_sync(0xffffffffu, least);
    }

    __device__ uint32_t query_smem() const {
        return ptx::smem_address(smem.queries[threadIdx.x / 32]);
    }

    __device__ void hold_queries() {
        if constexpr (Traits::kQueriesInRegisters) {
            device::load_a_tiles<Traits::kDim, Traits::kMTiles>(queries, query_smem(), 0);
        }
    }

    __device__ void score(float (&s)[Traits::kMTiles][Traits::kNTiles][4], int stage) const {
        uint32_t units = ptx::smem_address(smem.units[stage]);
        if constexpr (Traits::kQueriesInRegisters) {
            device::score_tile<T, Traits::kDim>(s, queries, units);
        } else {
            device::score_tile<T, Traits::kDim>(s, query_smem(), 0, units);
        }
    }

    __device__ void mask(float (&s)[Traits::kMTiles][Traits::kNTiles][4], int first_unit) const {
        int lane_unit = first_unit + 2 * (threadIdx.x & 3);
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m)
#pragma unroll
            for (int n = 0; n < Traits::kNTiles; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (lane_unit + 8 * n + (e & 1) >= visible[m][e >> 1]) s[m][n][e] = -INFINITY;
    }

    // Scores one chunk that has landed in `stage` and records its blocks.
    __device__ void chunk(Rows& rows, int chunk, int stage) const {
        float s[Traits::kMTiles][Traits::kNTiles][4];
        score(s, stage);
        int first_unit = chunk * Traits::kChunkUnits;
        if (first_unit + Traits::kChunkUnits > all_visible) mask(s, first_unit);
        rows.raise(s, scale_log2);
        weigh(s, rows, scale_log2);

        int first_block = chunk * Traits::kChunkBlocks;
        bool kept[Blocks::kCount];
        if (work.track_kept) {
#pragma unroll
            for (int v = 0; v < Blocks::kCount; ++v)
                kept[v] = !is_eligible(work.ranges, work.span, first_block + Blocks::index(v));
        }
        float mass[kRowGroups][Blocks::kCount];
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total[Blocks::kCount];
                Blocks::sum(s[m], half, total);
                rows.template add<Blocks>(m, half, total);
                if (work.track_kept) rows.template keep<Blocks>(m, half, total, kept);
#pragma unroll
                for (int v = 0; v < Blocks::kCount; ++v)
                    mass[2 * m + half][v] = total[v] * rows.inverse[m][half];
            }
        }
#pragma unroll
        for (int v = 0; v < Blocks::kCount; ++v) {
            uint2 running = {group_max2(device::pack2<__nv_bfloat16>(mass[0][v], mass[1][v])),
                             group_max2(device::pack2<__nv_bfloat16>(mass[2][v], mass[3][v]))};
            int block = first_block + Blocks::index(v);
            if ((threadIdx.x & 31) < 4 && Blocks::owner() && block < work.num_blocks)
                work.records[block].running = running;
        }
    }

    // Notes the normalisers so far as the references of `period`.
    __device__ void refer(Rows& rows, int period, bool is_final) const {
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float log2_sum = rows.refer(m, half, is_final);
                if ((lane & 3) == 0)
                    work.references[period * 32 + 16 * m + 8 * half + lane / 4] = log2_sum;
            }
        }
    }

    // Turns the records into upper bounds: a mass by a reference times the largest ratio of
    // reference to final normaliser in its row group.
    __device__ void bound(int chunks) const {
        const int lane = threadIdx.x & 31;
        const int periods = period_of_step(chunks - 1) + 1;
        __syncwarp();  // records and references are written
        const float final_log2 = work.references[periods * 32 + lane];
        for (int p = 0; p < periods; ++p) {
            float ratio =
                final_log2 == -INFINITY ? 0.0f : exp2f(work.references[p * 32 + lane] - final_log2);
            for (int step = 1; step < 8; step *= 2)
                ratio = fmaxf(ratio, __shfl_xor_sync(0xffffffffu, ratio, step));
            __syncwarp();  // all lanes have read this period's references
            if (lane % 8 == 0) work.references[p * 32 + lane / 8] = ratio;
        }
        __syncwarp();
        for (int block = lane; block < work.num_blocks; block += 32) {
            int step = step_of_chunk(block / Traits::kChunkBlocks, chunks);
            float4 ratio =
                *reinterpret_cast<const float4*>(work.references + period_of_step(step) * 32);
            uint2 running = work.records[block].running;
            float largest =
                fmaxf(fmaxf(scaled(running.x << 16, ratio.x), scaled(running.x, ratio.y)),
                      fmaxf(scaled(running.y << 16, ratio.z), scaled(running.y, ratio.w)));
            work.records[block].word = is_eligible(work.ranges, work.span, block)
                                           ? __float_as_uint(largest * kBoundSlack)
                                           : kIneligible;
        }
        __syncwarp();
    }
    // The bfloat16 in the high half of `word` times `ratio`, finite.
    static __device__ __forceinline__ float scaled(uint32_t word, float ratio) {
        float x = __uint_as_float(word & 0xffff0000u) * ratio;
        return x <= kLargestBound ? x : kLargestBound;  // inf * 0 bounds nothing
    }

    // All chunks of the CTA's tiles; `units_gmem` is [U, Ds] of the KV head. Ends with a barrier.
    __device__ void run(Rows& rows, const T* units_gmem, int64_t num_units, int summary_dim,
                        int chunks) {
        hold_queries();
        auto load = [&](int step) {
            int64_t first = int64_t{chunk_of_step(step, chunks)} * Traits::kChunkUnits;
            device::copy_tile_async<Traits::kChunkUnits, Traits::kDim, Traits::kThreads>(
                ptx::smem_address(smem.units[step % Traits::kStages]),
                units_gmem + first * summary_dim, summary_dim, num_units - first, summary_dim);
            ptx::cp_async_commit();
        };
        if (chunks > 0) load(0);
        int period = -1;
        for (int step = 0; step < chunks; ++step) {
            ptx::cp_async_wait<0>();
            __syncthreads();  // this chunk has landed; nobody reads the other stage any more
            if (step + 1 < chunks) load(step + 1);
            if (period_of_step(step) != period) refer(rows, ++period, false);
            int c = chunk_of_step(step, chunks);
            if (c * Traits::kChunkBlocks < work.num_blocks) chunk(rows, c, step % Traits::kStages);
        }
        __syncthreads();  // the stages are free for the second look
        if (chunks > 0) {
            refer(rows, period + 1, true);
            bound(chunks);
        }
    }
};

}  // namespace condensate::kernels::block_select
