// The selectors, each one described once, and what follows from a description: summaries, scans,
// refinement, budgets. docs/definition.md states it in words.
#pragma once

#include <cstdint>

#include "condensate/geometry.h"
#include "condensate/host_device.h"
#include "condensate/tuning.h"
#include "condensate/types.h"

namespace condensate {

// Summaries. A block of keys is described by summary rows, all of a block side by side, so that a
// growing cache only appends. A row is a unit: what is kept of a short run of keys.
struct UnitLevel {
    int keys;       // that a unit describes
    int per_block;  // units of a block
    int first_row;  // of these units among the block's rows
};
constexpr UnitLevel kShortUnits = {8, 8, 0};
constexpr UnitLevel kCoarseUnits = {64, 1, 8};
constexpr UnitLevel kSingleKeys = {1, kBlockKeys, 0};  // the keys themselves
constexpr UnitLevel kQuestUnits = {16, 4, 0};
constexpr UnitLevel kMeanUnits = {64, 1, 0};

// What the numbers of a unit are.
enum class UnitContent : int32_t {
    kMean,    // the mean key
    kBounds,  // elementwise [max over the keys | min over them]
};

// The scan scores averaged queries against every visible unit: masses of `mass` units, in units of
// the softmax sum over `norm` units.
struct ScoringLevels {
    UnitLevel norm;
    UnitLevel mass;
};

// All that tells one selector from another.
struct SelectorTraits {
    const char* name = "";
    bool lists_blocks = true;  // one list of blocks a tile; otherwise single keys a query and head
    ScoringLevels scan = {kMeanUnits, kMeanUnits};
    int rows_per_block = 1;  // of summaries
    UnitContent content = UnitContent::kMean;
    bool shares_scans = false;    // of a long context, so that its lists are refined by units
    bool refines_by_key = false;  // a single query's lists, where the keys are given
    bool has_block_means = false;
    UnitLevel block_means = kMeanUnits;  // where summaries hold the mean key of a block, if they do
};
CONDENSATE_HOST_DEVICE constexpr SelectorTraits selector_traits(Selector selector) {
    SelectorTraits traits;
    switch (selector) {
        case Selector::kBlock:
            traits.name = "block";
            traits.scan = {kCoarseUnits, kShortUnits};
            traits.rows_per_block = 9;  // 8 short units, then the coarse one
            traits.shares_scans = true;
            traits.refines_by_key = true;
            traits.has_block_means = true;
            traits.block_means = kCoarseUnits;
            break;
        case Selector::kQuest:
            traits.name = "quest";
            traits.scan = {kQuestUnits, kQuestUnits};
            traits.rows_per_block = 4;
            traits.content = UnitContent::kBounds;
            break;
        case Selector::kMean:
            traits.name = "mean";
            traits.has_block_means = true;
            break;
        case Selector::kExact:
            traits.name = "exact";
            traits.lists_blocks = false;
            traits.rows_per_block = 0;
            break;
    }
    return traits;
}
constexpr Selector kSelectors[] = {Selector::kBlock, Selector::kQuest, Selector::kMean,
                                   Selector::kExact};

CONDENSATE_HOST_DEVICE constexpr int rows_per_block(Selector selector) {
    return selector_traits(selector).rows_per_block;
}
CONDENSATE_HOST_DEVICE int64_t summary_rows(Selector selector, int64_t kv_len) {
    return num_blocks(kv_len) * rows_per_block(selector);  // units past kv_len are zero
}
// Row of unit `unit` of a level, counted over all blocks.
CONDENSATE_HOST_DEVICE int64_t summary_row(UnitLevel level, int rows_per_block, int64_t unit) {
    return unit / level.per_block * rows_per_block + level.first_row + unit % level.per_block;
}
CONDENSATE_HOST_DEVICE int summary_dim(Selector selector, int head_dim) {
    return selector_traits(selector).content == UnitContent::kBounds ? 2 * head_dim : head_dim;
}
CONDENSATE_HOST_DEVICE constexpr ScoringLevels scan_levels(Selector selector) {
    return selector_traits(selector).scan;
}
// Do summaries hold two levels of units, `mass` and `norm`, or one that is both?
CONDENSATE_HOST_DEVICE constexpr bool has_two_levels(Selector selector) {
    return scan_levels(selector).norm.keys != scan_levels(selector).mass.keys;
}

template <Selector kSelector_>
struct SelectorConstant {
    static constexpr Selector kSelector = kSelector_;
};
// Calls `visit` with the SelectorConstant of a selector of blocks that is known only at run time;
// returns Result{} for any other.
template <class Result, int kIndex = 0, class Visit>
Result with_block_selector(Selector selector, Visit visit) {
    constexpr Selector kSelector = kSelectors[kIndex];
    if constexpr (selector_traits(kSelector).lists_blocks) {
        if (selector == kSelector) return visit(SelectorConstant<kSelector>{});
    }
    if constexpr (kIndex + 1 < static_cast<int>(sizeof(kSelectors) / sizeof(Selector)))
        return with_block_selector<Result, kIndex + 1>(selector, visit);
    return Result{};
}
inline bool is_block_selector(Selector selector) {
    return with_block_selector<bool>(selector, [](auto) { return true; });
}

// Whole blocks of a budget in keys, at most `most`.
CONDENSATE_HOST_DEVICE int64_t budget_blocks(int64_t keys, int64_t most) {
    return min_i64(max_i64(keys, 0) / kBlockKeys, most);
}

// A scan tile is as many consecutive tiles as share one scan and its shortlist: twice as many
// whenever the keys have doubled, so that the scans of a long context are linear in its length.
// It has the averaged queries of one tile, of so many times the positions.
CONDENSATE_HOST_DEVICE int scan_tiles(Selector selector, int64_t kv_len) {
    if (!selector_traits(selector).shares_scans) return 1;
    int tiles = 1;
    while (tiles < kMaxScanTiles && kv_len > tiles * kScanKeys) tiles *= 2;
    return tiles;
}
CONDENSATE_HOST_DEVICE int scan_positions(Selector selector, int group, int64_t kv_len) {
    return scan_tiles(selector, kv_len) * tile_positions(group);
}
CONDENSATE_HOST_DEVICE int scan_pool_size(Selector selector, int group, int64_t kv_len) {
    return scan_tiles(selector, kv_len) * pool_size(group);
}
CONDENSATE_HOST_DEVICE int64_t num_scan_tiles(Selector selector, int64_t query_len, int group,
                                              int64_t kv_len) {
    return ceil_div(query_len, scan_positions(selector, group, kv_len));
}

// How a shortlist becomes a list: by another look at its blocks. kNone: the scan makes the list.
enum class Refinement : int32_t {
    kNone,
    kUnits,  // at their short units, by the tile's own averaged queries: a shared scan
    kKeys,   // at their keys: a single query
};
CONDENSATE_HOST_DEVICE Refinement refinement_of(Selector selector, int64_t query_len,
                                                int64_t kv_len, bool keys_given) {
    if (selector_traits(selector).refines_by_key && query_len == 1 && keys_given)
        return Refinement::kKeys;
    return scan_tiles(selector, kv_len) > 1 ? Refinement::kUnits : Refinement::kNone;
}
// Blocks of a shortlist, at most, for lists of at most `max_blocks`.
CONDENSATE_HOST_DEVICE int64_t shortlist_width(Refinement refinement, int64_t max_blocks) {
    return max_i64(64, (refinement == Refinement::kKeys ? 4 : 2) * max_blocks);
}

// What a refinement adds up the weights of.
CONDENSATE_HOST_DEVICE constexpr UnitLevel refinement_level(Refinement refinement) {
    if (refinement == Refinement::kKeys) return kSingleKeys;
    return kShortUnits;
}

// On either side of a tile's windows a scan tile has at most this many more eligible blocks than
// the tile, so enough of a full shortlist is eligible for the tile to fill its list. The window of
// a row ends in one block; those of a tile's rows in two.
constexpr int kMoreEligible = (kMaxScanTiles - 1) * kMaxTilePositions / kBlockKeys + 2;
static_assert(2 * kMoreEligible <= 32, "a shortlist has room for at least 32 blocks more");

// Keys, or blocks where the selector lists these, that the fullest row or tile could select from,
// at most.
CONDENSATE_HOST_DEVICE int64_t max_candidates(const Ranges& r, Selector selector) {
    int64_t last = r.kv_len - 1 - (r.causal ? r.window : 0);  // last key that can lie outside
    if (last < r.anchors) return 0;
    if (!selector_traits(selector).lists_blocks) return last - r.anchors + 1;
    return last / kBlockKeys - r.anchors / kBlockKeys + 1;
}
// Does the budget reach every key, so that selection has nothing to leave out?
CONDENSATE_HOST_DEVICE bool budget_covers(const Ranges& r, int64_t topk, Selector selector) {
    int64_t unit = selector_traits(selector).lists_blocks ? kBlockKeys : 1;
    return topk / unit >= max_candidates(r, selector);
}

}  // namespace condensate
