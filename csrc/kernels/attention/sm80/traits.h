// Shapes and shared memory of the mma.sync attention kernel.
#pragma once

#include "device/smem_tile.h"

namespace condensate::kernels::sm80 {

template <class T_, int kDim_, int kMTiles_, bool kExact_>
struct AttentionTraits {
    using T = T_;
    static constexpr int kDim = kDim_;        // head_dim rounded up; the rest is zeros
    static constexpr int kMTiles = kMTiles_;  // 16-row tiles of a warp
    static constexpr bool kExact = kExact_;   // per-row score thresholds
    static constexpr int kWarps = 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kWarpRows = 16 * kMTiles;
    static constexpr int kRows = kWarps * kWarpRows;         // of a tile, per CTA
    static constexpr int kStepKeys = kDim <= 128 ? 64 : 32;  // keys of one pipeline step
    static constexpr int kStages = 2;
    static constexpr int kNTiles = kStepKeys / 8;  // 8-key score tiles of a step
    static constexpr int kDTiles = kDim / 8;       // 8-channel output tiles

    struct alignas(128) Smem {
        T q[kRows * kDim];  // reused for the output
        T k[kStages][kStepKeys * kDim];
        T v[kStages][kStepKeys * kDim];
    };
    static_assert(sizeof(Smem) <= 99 * 1024, "every sm_80+ device offers 99 KB to a CTA");
};

}  // namespace condensate::kernels::sm80
