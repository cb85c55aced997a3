// First look: every unit is scored once. Per tile and block this leaves an upper bound of the
// block's mass in scratch, because the normaliser only knows the chunks seen so far.
#pragma once

#include "condensate/params.h"
#include "device/mma_tile.h"
#include "kernels/block_select/masses.h"
#include "kernels/block_select/pooled_queries.h"

namespace condensate::kernels::block_select {

// A tile's masses in scratch, one 32-bit word per block. Ordered as unsigned within each state:
//   sign clear  an upper bound (float bits), sign set  the mass itself (float bits | kExact),
//   kIneligible  may not be listed.
constexpr uint32_t kExact = 0x80000000u;
constexpr uint32_t kIneligible = 0xffffffffu;

// What a warp knows of its tile.
struct TileWork {
    Ranges ranges;
    TileSpan span;
    int num_blocks;  // blocks any of its queries can reach; 0 for a tile past the end
    uint32_t* masses;
};

// The order of chunks: attention sinks first and then back from the diagonal, where most mass lies,
// so that the normaliser is nearly final early and the bounds are tight.
__device__ __forceinline__ int chunk_of_step(int step, int chunks) {
    return step == 0 ? 0 : chunks - step;
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
                    exists ? visible_units(work.ranges, pooled.last_position(tile, row), unit_keys) : 0;
                least = min(least, visible[m][half]);
            }
        }
        all_visible = __reduce_min_sync(0xffffffffu, least);
    }

    __device__ uint32_t query_smem() const { return ptx::smem_address(smem.queries[threadIdx.x / 32]); }

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

    // Scores one chunk that has landed in `stage` and writes the bounds of its blocks.
    __device__ void chunk(Rows& rows, int chunk, int stage) const {
        float s[Traits::kMTiles][Traits::kNTiles][4];
        score(s, stage);
        int first_unit = chunk * Traits::kChunkUnits;
        if (first_unit + Traits::kChunkUnits > all_visible) mask(s, first_unit);
        rows.raise(s, scale_log2);
        weigh(s, rows, scale_log2);

        int first_block = chunk * Traits::kChunkBlocks;
        bool eligible[Blocks::kCount];
#pragma unroll
        for (int v = 0; v < Blocks::kCount; ++v) {
            eligible[v] = is_eligible(work.ranges, work.span, first_block + Blocks::index(v));
        }
        float largest[Blocks::kCount] = {};
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total[Blocks::kCount];
                Blocks::sum(s[m], half, total);
                float sum = 0.0f;
#pragma unroll
                for (int v = 0; v < Blocks::kCount; ++v) {
                    float own = Blocks::owner() ? total[v] : 0.0f;
                    sum += own;
                    rows.kept[m][half] += eligible[v] ? 0.0f : own;
                }
                rows.sum[m][half] += device::quad_sum(sum);
                float inverse = rows.inverse(m, half);
#pragma unroll
                for (int v = 0; v < Blocks::kCount; ++v)
                    largest[v] = fmaxf(largest[v], total[v] * inverse);
            }
        }
#pragma unroll
        for (int v = 0; v < Blocks::kCount; ++v) {
            uint32_t bound = __float_as_uint(rows_max(largest[v]));
            int block = first_block + Blocks::index(v);
            if ((threadIdx.x & 31) < 4 && Blocks::owner() && block < work.num_blocks) {
                work.masses[block] = eligible[v] ? bound : kIneligible;
            }
        }
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
        for (int step = 0; step < chunks; ++step) {
            ptx::cp_async_wait<0>();
            __syncthreads();  // this chunk has landed; nobody reads the other stage any more
            if (step + 1 < chunks) load(step + 1);
            int c = chunk_of_step(step, chunks);
            if (c * Traits::kChunkBlocks < work.num_blocks) chunk(rows, c, step % Traits::kStages);
        }
        __syncthreads();  // the stages are free for the second look
    }
};

}  // namespace condensate::kernels::block_select
