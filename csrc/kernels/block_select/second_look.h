// Second look: the masses of the few blocks whose bound could put them among the top, with the
// final normaliser. Each warp works alone, on its own tile, in its own part of the stages.
#pragma once

#include "kernels/block_select/sweep.h"

namespace condensate::kernels::block_select {

template <class Traits>
struct SecondLook {
    using T = typename Traits::T;
    using Blocks = LaneBlocks<Traits::kUnitsPerBlock, Traits::kBatchUnits / 8>;
    using Rows = RowNormaliser<Traits::kMTiles>;
    static constexpr int kBufferElems = Traits::kBatchUnits * Traits::kDim;

    const Sweep<Traits>& sweep;
    Rows& rows;
    const T* units_gmem;
    int summary_dim;
    bool accumulate_kept;  // add the blocks' weights to rows.kept instead of storing their masses

    // The warp's own part of the stages.
    __device__ T* buffers() const {
        return sweep.smem.units[0] + (threadIdx.x / 32) * Traits::kBatchStages * kBufferElems;
    }
    __device__ uint32_t buffer_smem(int batch) const {
        return ptx::smem_address(buffers() + batch % Traits::kBatchStages * kBufferElems);
    }

    // Block of unit row `row` of a batch, or -1 past the queue's end.
    __device__ int block_of(const int* queue, int count, int batch, int row) const {
        int i = batch * Traits::kBatchBlocks + row / Traits::kUnitsPerBlock;
        return i < count ? queue[i] : -1;
    }

    __device__ void load(const int* queue, int count, int batch) const {
        constexpr int kChunks = Traits::kDim / 8;
        const int lane = threadIdx.x & 31, chunk = lane % kChunks;
        const bool in_columns = chunk * 8 < summary_dim;
        uint32_t tile = buffer_smem(batch);
#pragma unroll
        for (int i = 0; i < Traits::kBatchUnits * kChunks / 32; ++i) {
            int row = lane / kChunks + i * (32 / kChunks);
            int block = block_of(queue, count, batch, row);
            bool copy = block >= 0 && in_columns;
            int64_t unit = int64_t{block} * Traits::kUnitsPerBlock + row % Traits::kUnitsPerBlock;
            ptx::cp_async_16(tile + device::tile_offset<Traits::kDim>(row, chunk),
                             copy ? units_gmem + unit * summary_dim + chunk * 8 : units_gmem, copy);
        }
    }

    __device__ void score(const int* queue, int count, int batch) {
        constexpr int kNTiles = Traits::kBatchUnits / 8;
        float s[Traits::kMTiles][kNTiles][4];
        device::score_tile<T, Traits::kDim>(s, sweep.query_smem(), 0, buffer_smem(batch));
        bool whole = Traits::kBatchBlocks == 1 &&
                     (queue[batch] + 1) * Traits::kUnitsPerBlock <= sweep.all_visible;
        if (!whole) mask(s, queue, count, batch);
        weigh(s, rows, sweep.scale_log2);
        float largest[Blocks::kCount] = {};
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total[Blocks::kCount];
                Blocks::sum(s[m], half, total);
#pragma unroll
                for (int v = 0; v < Blocks::kCount; ++v) {
                    largest[v] = fmaxf(largest[v], total[v] * rows.inverse[m][half]);
                    if (accumulate_kept && Blocks::owner()) rows.kept[m][half] += total[v];
                }
            }
        }
        if (accumulate_kept) return;
#pragma unroll
        for (int v = 0; v < Blocks::kCount; ++v) {
            uint32_t mass = __float_as_uint(group_max(largest[v]));
            int i = batch * Traits::kBatchBlocks + Blocks::index(v);
            if ((threadIdx.x & 31) < 4 && Blocks::owner() && i < count) {
                sweep.work.records[queue[i]].word = mass | kExact;
            }
        }
    }

    // Units of a batch lie anywhere, so each element looks up which unit it is.
    __device__ void mask(float (&s)[Traits::kMTiles][Traits::kBatchUnits / 8][4], const int* queue,
                         int count, int batch) const {
#pragma unroll
        for (int n = 0; n < Traits::kBatchUnits / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                int row = 8 * n + 2 * (threadIdx.x & 3) + e;
                int block = block_of(queue, count, batch, row);
                int unit = block * Traits::kUnitsPerBlock + row % Traits::kUnitsPerBlock;
#pragma unroll
                for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        if (block < 0 || unit >= sweep.visible[m][half])
                            s[m][n][2 * half + e] = -INFINITY;
                    }
                }
            }
        }
    }

    // Looks at the `count` blocks in the warp's queue.
    __device__ void run(const int* queue, int count) {
        int batches = (count + Traits::kBatchBlocks - 1) / Traits::kBatchBlocks;
        constexpr int kAhead = Traits::kBatchStages;
        for (int b = 0; b < kAhead; ++b) {
            if (b < batches) load(queue, count, b);
            ptx::cp_async_commit();
        }
        for (int b = 0; b < batches; ++b) {
            ptx::cp_async_wait<kAhead - 1>();
            __syncwarp();
            score(queue, count, b);
            __syncwarp();  // the warp has read this buffer
            if (b + kAhead < batches) load(queue, count, b + kAhead);
            ptx::cp_async_commit();
        }
        ptx::cp_async_wait<0>();
        __syncwarp();
    }
};

}  // namespace condensate::kernels::block_select
