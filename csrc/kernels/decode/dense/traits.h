// Shapes and shared memory of the dense decoding kernel.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "device/float8.h"
#include "device/smem_tile.h"
#include "kernels/decode/dense/work.h"

namespace condensate::kernels::decode {

// Element of the cache: float16, bfloat16 or Float8.
template <class Element_, int kDim_, int kMTiles_>
struct DenseTraits {
    using Element = Element_;
    static constexpr int kDim = kDim_;
    static constexpr int kMTiles = kMTiles_;  // 16-row tiles, the same rows for every warp
    static constexpr bool kFloat8 = std::is_same_v<Element, device::Float8>;
    using T = std::conditional_t<kFloat8, __half, Element>;  // of products
    static constexpr int kRows = 16 * kMTiles;
    static constexpr int kTileKeys = 16;  // keys of one step of one warp; in one page
    static constexpr int kDTiles = kDim / 8;
    static constexpr int kKSteps = kDim / 16;

    static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Element));
    static constexpr int kChunks = kRowBytes / 16;  // 16-byte chunks of a row
    static constexpr int kChunkElems = 16 / static_cast<int>(sizeof(Element));
    // Swizzled rows are whole 128-byte lines; head_dim 96 leaves a part of them alone.
    static constexpr int kPitchBytes = kRowBytes <= 128 ? 128 : kRowBytes <= 256 ? 256 : 512;
    static constexpr int kPitch = kPitchBytes / 2;  // as tile_offset counts, in 16-bit elements
    static constexpr int kTileBytes = kTileKeys * kPitchBytes;

    static constexpr int kWarps = kPitchBytes == 512 ? 2 : 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kStages = 98304 / (kWarps * 2 * kTileBytes);
    static constexpr int kCtasPerSm = 2;

    // Of a warp, when its keys are done: rows of float32 outputs, apart so that banks differ.
    static constexpr int kOutPitch = kDim + 8;

    struct Stage {
        char k[kTileBytes], v[kTileBytes];
    };
    struct Smem {
        union {
            Stage stage[kStages];
            float out[kRows * kOutPitch];
        } warp[kWarps];
        float reference[kWarps][kRows];
        float sum[kWarps][kRows];
        WorkWalk work;
    };
    static_assert(kChunks % 2 == 0, "a warp copies a tile in whole passes");
    static_assert(sizeof(Smem) <= 99 * 1024, "what the smallest GPUs allow a CTA");
};

}  // namespace condensate::kernels::decode
