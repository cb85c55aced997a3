// Shapes and shared memory of the fused scoring and top-k kernel.
#pragma once

#include "condensate/geometry.h"
#include "device/smem_tile.h"

namespace condensate::kernels::block_select {

// One warp owns one tile: its pooled queries are the warp's 32 rows.
template <class T_, int kDim_, int kUnitsPerBlock_>
struct Traits {
    using T = T_;
    static constexpr int kDim = kDim_;                      // summary_dim rounded up
    static constexpr int kUnitsPerBlock = kUnitsPerBlock_;  // 16 block, 4 quest, 1 mean
    static constexpr int kWarps = 4;                        // tiles of a CTA
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kRows = 32;  // pooled queries of a tile, at most
    static constexpr int kMTiles = kRows / 16;
    static constexpr int kStages = 2;
    static constexpr int kChunkUnits = kDim <= 128 ? 64 : 32;  // units of one pipeline step
    static constexpr int kNTiles = kChunkUnits / 8;
    static constexpr int kChunkBlocks = kChunkUnits / kUnitsPerBlock;
    static constexpr bool kQueriesInRegisters = kDim <= 128;
    static constexpr int kBatchUnits = 16;  // units of one step of the second look
    static constexpr int kBatchBlocks = kBatchUnits / kUnitsPerBlock;
    static constexpr int kQueueBlocks = 64;

    struct alignas(128) Smem {
        T queries[kWarps][kRows * kDim];
        T units[kStages][kChunkUnits * kDim];
        int queue[kWarps][kQueueBlocks];
    };
    // After the first look each warp owns a part of the stages: buffers of kBatchUnits units, or a
    // histogram.
    static constexpr int kBatchStages = kStages * kChunkUnits / (kWarps * kBatchUnits);
    static_assert(sizeof(Smem) <= 99 * 1024, "every sm_80+ device offers 99 KB to a CTA");
    static_assert(kBatchStages >= 1, "a warp needs a buffer for its second look");
};

// Persistent CTAs per multiprocessor; each owns scratch for its tiles' block masses.
constexpr int kCtasPerSm = 2;

}  // namespace condensate::kernels::block_select
