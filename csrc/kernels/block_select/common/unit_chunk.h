// Chunks of 64 units in shared memory, laid out so that the accumulators of a lane hold whole
// blocks, and how cp.async brings them there.
#pragma once

#include <cstdint>

#include "condensate/selectors.h"
#include "device/smem_tile.h"
#include "kernels/block_select/common/traits.h"
#include "ptx/tensor_copy.h"

namespace condensate::kernels::block_select {

// A lane's accumulators of one row are columns 2 t and 2 t + 1 (t = lane % 4) of eight 8-column
// tiles: 16 places, place p in tile p / 2. With cp.async, block b of the chunk goes to lane b % 4,
// its units side by side, so that sums over a block need no shuffle; `row` only permutes the bits
// of `unit`. TMA keeps units in order, and so do keys, of which a block fills a chunk:
// the four lanes of a row share each block.
template <int kBlockUnits, bool kByEngine>
struct ChunkLayout {
    static constexpr bool kInOrder = kByEngine || kBlockUnits == kBlockKeys;
    static constexpr int kBlocks = kChunkUnits / kBlockUnits;  // of a chunk
    // Blocks of which a lane holds units, and how many of each.
    static constexpr int kLaneUnits = kInOrder ? kBlockUnits / 4 : kBlockUnits;
    static constexpr int kLaneBlocks = 16 / kLaneUnits;
    static_assert(!kInOrder || kBlockUnits % 8 == 0, "a block fills 8-column tiles");

    // Where unit `unit` of the chunk lies.
    CONDENSATE_HOST_DEVICE static int row(int unit) {
        if constexpr (kInOrder) return unit;
        int block = unit / kBlockUnits;
        int place = block / 4 * kBlockUnits + unit % kBlockUnits;
        return place / 2 * 8 + block % 4 * 2 + place % 2;
    }
    // Block of the chunk whose units are places v * kLaneUnits and on of this lane.
    static __device__ __forceinline__ int block(int v) {
        return kInOrder ? v : 4 * v + static_cast<int>(threadIdx.x & 3);
    }
    // Unit of its block that a place of this lane holds.
    static __device__ __forceinline__ int unit_in_block(int place) {
        if constexpr (!kInOrder) return place % kBlockUnits;
        const int column = place / 2 * 8 + 2 * static_cast<int>(threadIdx.x & 3) + place % 2;
        return column % kBlockUnits;
    }
};

// Who copies what: a thread copies 16 bytes of every kPassUnits-th unit.
template <class Traits>
struct CopyShape {
    static constexpr int kChunks = Traits::kDim / 8;
    static constexpr int kPassUnits = Traits::kThreads / kChunks;
    static constexpr int kPasses = kChunkUnits / kPassUnits;
    static_assert(kPassUnits % 4 == 0 && (16 % kPassUnits == 0 || kPassUnits % 16 == 0),
                  "a pass holds whole blocks or lies in one");

    static __device__ __forceinline__ int unit() { return static_cast<int>(threadIdx.x) / kChunks; }
    static __device__ __forceinline__ int channel() {
        return static_cast<int>(threadIdx.x) % kChunks * 8;
    }
};

template <class T>
struct UnitSource {
    const T* gmem;
    bool exists;  // else zeros
};

// Starts copying a chunk; source(pass) is the UnitSource of this thread's 16 bytes in that pass.
template <class Traits, int kBlockUnits, class Source>
__device__ __forceinline__ void copy_chunk_async(uint32_t stage_smem, Source&& source) {
    using Shape = CopyShape<Traits>;
    using Layout = ChunkLayout<kBlockUnits, false>;
    const uint32_t lane_smem = stage_smem + device::tile_offset<Traits::kDim>(
                                                Layout::row(Shape::unit()), Shape::channel() / 8);
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
        // Bits of row(pass * kPassUnits) and of row(unit()) are apart, so rows and swizzles add up.
        int row = Layout::row(pass * Shape::kPassUnits);
        UnitSource<typename Traits::T> from = source(pass);
        ptx::cp_async_16((lane_smem ^ ((row & 7) << 4)) + row * (Traits::kDim * 2), from.gmem,
                         from.exists);
    }
}

// All units of one level of a KV head in order, for copy_chunk_async.
template <class Traits>
struct LevelStream {
    using T = typename Traits::T;
    using Shape = CopyShape<Traits>;
    const T* lane_gmem;  // this thread's part of chunk 0
    int per_block;       // units
    int block_stride;    // elements
    int dim;
    int lane_units;  // of the level, counted from this thread's first one

    __device__ __forceinline__ LevelStream(const T* summaries, UnitLevel level, int rows_per_block,
                                           int num_blocks, int dim)
        : lane_gmem(summaries + summary_row(level, rows_per_block, Shape::unit()) * dim +
                    Shape::channel()),
          per_block(level.per_block),
          block_stride(rows_per_block * dim),
          dim(dim),
          lane_units(Shape::channel() < dim ? num_blocks * level.per_block - Shape::unit() : 0) {}

    template <int kBlockUnits>
    __device__ __forceinline__ void copy(uint32_t stage_smem, int chunk) const {
        const T* src = lane_gmem + int64_t{chunk} * (kChunkUnits / per_block) * block_stride;
        const int left = lane_units - chunk * kChunkUnits;
        copy_chunk_async<Traits, kBlockUnits>(stage_smem, [&](int pass) {
            // A pass holds whole blocks or lies in one.
            const int first = pass * Shape::kPassUnits;
            const int offset = first / per_block * block_stride + first % per_block * dim;
            return UnitSource<T>{src + offset, first < left};
        });
    }
};

}  // namespace condensate::kernels::block_select
