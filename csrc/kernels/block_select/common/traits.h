// Shapes and shared memory of the scan and the refinement. Both score 64 or 128 rows, held in
// registers, against units that stream through shared memory 64 at a time.
#pragma once

#include <climits>
#include <type_traits>

#include "condensate/selectors.h"
#include "device/smem_tile.h"
#include "kernels/block_select/common/unit_maps.h"

namespace condensate::kernels::block_select {

constexpr int kChunkUnits = 64;  // units of one pipeline step
constexpr int kRadixBins = 256;
constexpr int kSmemWindow = 256;  // candidates of a warp that shared memory has room for
constexpr int kNoRow = INT_MIN;

// Warps of a CTA. The scan's share the units that are loaded, a tile each; where a tile's pooled
// queries need two 16-row tiles of a warp, four warps.
constexpr int kRefineWarps = 4;
constexpr int scan_warps(int group) { return group <= 16 ? 8 : 4; }

// Persistent CTAs per SM, at most; each owns scratch in the workspace. Before sm_90
// there is shared memory for half as many.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMostScanCtas = 1, kMostRefineCtas = 2;
#else
constexpr int kMostScanCtas = 2, kMostRefineCtas = 4;
#endif
constexpr int scan_ctas_per_sm(int dim) { return dim <= 128 ? kMostScanCtas : 1; }
constexpr int refine_ctas_per_sm(int dim) { return dim <= 128 ? kMostRefineCtas : 2; }

template <class T_, int kDim_, int kWarps_, int kMTiles_, int kStages_, Selector kSelector_,
          bool kWgmma_>
struct RowTraits {
    using T = T_;
    static constexpr int kDim = kDim_;  // summary_dim rounded up; the rest is zeros
    static constexpr int kWarps = kWarps_;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kMTiles = kMTiles_;  // 16-row tiles of a warp
    static constexpr int kWarpRows = 16 * kMTiles;
    static constexpr int kRows = kWarps * kWarpRows;
    static constexpr int kNTiles = kChunkUnits / 8;
    static constexpr int kStages = kStages_;
    static constexpr Selector kSelector = kSelector_;
    // Scores by wgmma of units that TMA loads, else by mma.sync and cp.async.
    static constexpr bool kWgmma = kWgmma_;
    using Maps = std::conditional_t<kWgmma, UnitMaps, NoMaps>;
    static constexpr int kPanels = kDim / 64;  // of 64 channels, as wgmma wants them
    static constexpr int kPanelBytes = kChunkUnits * 128;

    // What is read once a chunk or less lies here, to leave registers to queries and scores.
    struct alignas(kWgmma ? 1024 : 128) Smem {
        // First the rows, until they are in registers, then the stages.
        T stages[kStages][kChunkUnits * kDim];
        uint32_t histogram[kWarps][kRadixBins];
        float norm[kRows];    // log2 of a row's softmax sum
        int position[kRows];  // that decides what a row sees; kNoRow where there is no row
        // Barriers: a chunk is there (TMA's), all warps are done with it.
        uint64_t landed[kStages], released[kStages];
    };
    static_assert(kRows <= kStages * kChunkUnits, "the rows fit in the stages");
    static_assert(sizeof(Smem) <= 99 * 1024, "every sm_80+ device offers 99 KB to a CTA");
};

// Scan: a warp's rows are the averaged queries of its tile.
template <class T, int kDim, int kWarps, Selector kSelector, bool kWgmma = false>
struct ScanTraits : RowTraits<T, kDim, kWarps, 8 / kWarps, kDim <= 128 ? 4 : 2, kSelector, kWgmma> {
    static constexpr int kCtasPerSm = scan_ctas_per_sm(kDim);
    static constexpr int kBlockUnits = scan_levels(kSelector).mass.per_block;
};

// Refinement: the CTA's rows are the averaged queries of one tile. Masses are of short units or, by
// mma.sync, of keys.
template <class T, int kDim, bool kKeys_ = false, bool kWgmma = false>
struct RefineTraits
    : RowTraits<T, kDim, kRefineWarps, 1, kDim <= 128 ? 3 : 2, Selector::kBlock, kWgmma> {
    // Few tiles are refined by keys, whose places take registers.
    static constexpr int kCtasPerSm = kKeys_ ? 2 : refine_ctas_per_sm(kDim);
    static constexpr bool kKeys = kKeys_;
    static_assert(!(kKeys && kWgmma), "the summaries alone have tensor maps");
};

}  // namespace condensate::kernels::block_select
