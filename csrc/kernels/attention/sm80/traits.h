// Shapes and shared memory of the mma.sync attention kernel.
#pragma once

#include "device/far_rows.h"
#include "device/smem_tile.h"

namespace condensate::kernels::sm80 {

// Shared memory of the far field.
template <bool kFar, int kWarps>
struct FarSmem {};
template <int kWarps>
struct FarSmem<true, kWarps> {
    float far_bias[kFarPools];  // log2 of a pooled row's weight in units of raw scores
    device::WalkSmem<kWarps, 64> walk;
};

// The far field is a template parameter because its code in the loop costs registers, of which
// 32 rows of 128 channels leave none.
template <class T_, int kDim_, int kMTiles_, bool kExact_, bool kFar_>
struct AttentionTraits {
    using T = T_;
    static constexpr int kDim = kDim_;        // head_dim rounded up; the rest is zeros
    static constexpr int kMTiles = kMTiles_;  // 16-row tiles of a warp
    static constexpr bool kExact = kExact_;   // per-row score thresholds
    static constexpr bool kFar = kFar_;       // pooled rows for what is not listed
    // The estimate of the omitted mass needs more registers than 32 rows of 128 channels leave.
    static constexpr bool kEstimates = kFar && !(kMTiles == 2 && kDim == 128);
    static constexpr int kWarps = 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kWarpRows = 16 * kMTiles;
    static constexpr int kRows = kWarps * kWarpRows;         // of a tile, per CTA
    static constexpr int kStepKeys = kDim <= 128 ? 64 : 32;  // keys of one pipeline step
    static constexpr int kStages = 2;
    // Pooled rows that the stages hold at once.
    static constexpr int kFarRound = kStages * kStepKeys;
    static constexpr int kNTiles = kStepKeys / 8;  // 8-key score tiles of a step
    static constexpr int kDTiles = kDim / 8;       // 8-channel output tiles

    struct alignas(128) Tiles {  // each on a 128-byte line, as the swizzle needs
        T q[kRows * kDim];       // reused for the output
        T k[kStages][kStepKeys * kDim];
        T v[kStages][kStepKeys * kDim];
    };
    struct Smem : Tiles, FarSmem<kFar, kWarps> {};
    static_assert(sizeof(Smem) <= 99 * 1024, "every sm_80+ device offers 99 KB to a CTA");
    static_assert(!(kExact && kFar), "thresholds judge every key, so none is condensed");
    static_assert(!kFar || kThreads == kFarPools, "a thread sets the bias of a pool");
};

}  // namespace condensate::kernels::sm80
