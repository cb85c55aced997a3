// Index arithmetic against its meaning, enumerated: every shortcut in geometry.h is compared with
// loops over rows and keys that use nothing but the definition's per-key predicates.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "condensate/selectors.h"

namespace condensate {
namespace {

// The definition, written out again: which keys a query at position p may attend.
bool sees(const Ranges& r, int64_t p, int64_t j) { return !r.causal || j <= p; }
bool windowed(const Ranges& r, int64_t p, int64_t j) {
    if (r.causal) return p - r.window + 1 <= j && j <= p;
    int64_t distance = j > p ? j - p : p - j;
    return distance < r.window;
}
bool ranged(const Ranges& r, int64_t p, int64_t j) {
    return sees(r, p, j) && (j < r.anchors || windowed(r, p, j));
}

struct Case {
    Ranges ranges;
    int64_t query_len;
    int group;
};

template <class Body>
void for_each_case(const Body& body) {
    for (int64_t kv_len : {0, 1, 63, 64, 65, 130, 192})
        for (int64_t query_len : {1, 2, 17, 64, 65, 140})
            for (int64_t window : {0, 1, 2, 64, 65, 90, 1000})
                for (int64_t anchors : {0, 1, 63, 64, 65, 130, 1000})
                    for (bool causal : {true, false})
                        for (int group : {1, 8, 64})
                            body(Case{{kv_len, window, anchors, causal}, query_len, group});
}

template <class Body>
void for_each_tile(const Case& c, const Body& body) {
    for (int64_t tile = 0; tile < num_tiles(c.query_len, c.group); ++tile)
        body(tile, tile_span(tile, tile_positions(c.group), c.query_len, c.ranges.kv_len));
}

std::string describe(const Case& c, TileSpan t, int64_t block) {
    return "kv_len " + std::to_string(c.ranges.kv_len) + " query_len " +
           std::to_string(c.query_len) + " window " + std::to_string(c.ranges.window) +
           " anchors " + std::to_string(c.ranges.anchors) + " causal " +
           std::to_string(c.ranges.causal) + " tile " + std::to_string(t.first) + ".." +
           std::to_string(t.last) + " block " + std::to_string(block);
}

// What loops find about one tile and block.
struct Facts {
    bool any_ranged = false, any_window = false, any_anchor = false;
    bool any_visible = false, any_outside = false;
    bool all_ranged = true, all_visible = true;
};
Facts look(const Case& c, TileSpan t, int64_t block) {
    Facts f;
    for (int64_t p = t.first; p <= t.last; ++p)
        for (int64_t j = block * kBlockKeys; j < (block + 1) * kBlockKeys; ++j) {
            bool exists = j < c.ranges.kv_len;
            bool visible = exists && sees(c.ranges, p, j);
            bool in = exists && ranged(c.ranges, p, j);
            f.any_visible |= visible;
            f.all_visible &= visible;
            f.any_ranged |= in;
            f.all_ranged &= in;
            f.any_window |= visible && windowed(c.ranges, p, j);
            f.any_anchor |= visible && j < c.ranges.anchors;
            f.any_outside |= visible && !in;
        }
    return f;
}

TEST(Geometry, TilePositionsFillTheRowsWithPowersOfTwo) {
    for (int group = 1; group <= kMaxGroup; ++group) {
        int positions = tile_positions(group);
        EXPECT_EQ(positions & (positions - 1), 0) << group;
        EXPECT_LE(positions * group, kTileRows) << group;
        EXPECT_LE(positions, kMaxTilePositions) << group;
        EXPECT_TRUE(positions == kMaxTilePositions || 2 * positions * group > kTileRows) << group;
        EXPECT_EQ(positions % pool_size(group), 0) << group;
        EXPECT_EQ(pool_size(group), std::min(positions, 8)) << group;
    }
    EXPECT_EQ(tile_positions(1), 64);
    EXPECT_EQ(tile_positions(2), 64);
    EXPECT_EQ(tile_positions(4), 32);
    EXPECT_EQ(tile_positions(8), 16);
    EXPECT_EQ(tile_positions(64), 2);
}

TEST(Geometry, TilesPartitionTheQueries) {
    for (int group : {1, 3, 4, 8, 40, 64})
        for (int64_t query_len = 1; query_len <= 200; ++query_len)
            for (int64_t kv_len : {0, 1, 150, 300}) {
                int64_t expected = kv_len - query_len;
                Case c{{kv_len, 0, 0, true}, query_len, group};
                for_each_tile(c, [&](int64_t, TileSpan t) {
                    ASSERT_EQ(t.first, expected);
                    ASSERT_LE(t.first, t.last);
                    ASSERT_LT(t.last - t.first, tile_positions(group));
                    expected = t.last + 1;
                });
                ASSERT_EQ(expected, kv_len);
            }
}

TEST(Geometry, ScanTilesKeepTheScanLinear) {
    for (int64_t k : {0, 1, 1000, 262144}) EXPECT_EQ(scan_tiles(Selector::kBlock, k), 1) << k;
    EXPECT_EQ(scan_tiles(Selector::kBlock, 262145), 2);
    EXPECT_EQ(scan_tiles(Selector::kBlock, 524288), 2);
    EXPECT_EQ(scan_tiles(Selector::kBlock, 1048576), 4);
    EXPECT_EQ(scan_tiles(Selector::kBlock, 1048577), 8);
    EXPECT_EQ(scan_tiles(Selector::kBlock, std::numeric_limits<int32_t>::max()), 8);
    for (Selector selector : {Selector::kQuest, Selector::kMean})
        EXPECT_EQ(scan_tiles(selector, 1048576), 1);
    for (int group = 1; group <= kMaxGroup; ++group)
        for (int64_t kv_len : {1000, 300000, 600000, 3000000}) {
            const int tiles = scan_tiles(Selector::kBlock, kv_len);
            const int positions = scan_positions(Selector::kBlock, group, kv_len);
            const int pool = scan_pool_size(Selector::kBlock, group, kv_len);
            EXPECT_EQ(positions, tiles * tile_positions(group));
            EXPECT_EQ(positions % pool, 0) << group;
            EXPECT_EQ(positions / pool, tile_positions(group) / pool_size(group));
            for (int64_t query_len : {1, 63, 64, 1000})
                EXPECT_EQ(num_scan_tiles(Selector::kBlock, query_len, group, kv_len),
                          ceil_div(num_tiles(query_len, group), tiles));
        }
}

TEST(Geometry, RefinementFollowsSharedScansAndSingleQueriesWithKeys) {
    const int64_t shared = kScanKeys + 1;
    for (bool keys : {true, false}) {
        for (Selector selector : {Selector::kQuest, Selector::kMean})
            for (int64_t query_len : {1, 100})
                EXPECT_EQ(refinement_of(selector, query_len, shared, keys), Refinement::kNone);
        EXPECT_EQ(refinement_of(Selector::kBlock, 2, kScanKeys, keys), Refinement::kNone);
        EXPECT_EQ(refinement_of(Selector::kBlock, 2, shared, keys), Refinement::kUnits);
    }
    for (int64_t kv_len : {int64_t{1}, shared})
        EXPECT_EQ(refinement_of(Selector::kBlock, 1, kv_len, true), Refinement::kKeys);
    EXPECT_EQ(refinement_of(Selector::kBlock, 1, kScanKeys, false), Refinement::kNone);
    EXPECT_EQ(refinement_of(Selector::kBlock, 1, shared, false), Refinement::kUnits);
}

TEST(Geometry, BudgetsAreWholeBlocksWithinTheLists) {
    EXPECT_EQ(budget_blocks(-64, 5), 0);
    EXPECT_EQ(budget_blocks(63, 5), 0);
    EXPECT_EQ(budget_blocks(64, 5), 1);
    EXPECT_EQ(budget_blocks(319, 5), 4);
    EXPECT_EQ(budget_blocks(384, 5), 5);
    EXPECT_EQ(budget_blocks(std::numeric_limits<int32_t>::min(), 5), 0);
}

TEST(Geometry, AFullShortlistOfAScanTileFillsTheListsOfItsTiles) {
    const int64_t kv_len = 3000, query_len = 1100;
    const int positions = kMaxTilePositions, tiles = kMaxScanTiles;
    for (int64_t window : {0, 1, 64, 65, 300, 1000})
        for (int64_t anchors : {0, 65, 700})
            for (bool causal : {true, false})
                for (int64_t tile = 0; tile * positions < query_len; ++tile) {
                    const Ranges r{kv_len, window, anchors, causal};
                    const TileSpan own = tile_span(tile, positions, query_len, kv_len);
                    const TileSpan scan =
                        tile_span(tile / tiles, tiles * positions, query_len, kv_len);
                    for (bool far_field : {false, true}) {
                        const auto whole = far_field ? WholeBlocks::kAll : WholeBlocks::kNone;
                        const auto shared = far_field ? WholeBlocks::kAnchors : WholeBlocks::kNone;
                        int more = 0, listable = 0;
                        for (int64_t block = 0; block < num_blocks(kv_len); ++block) {
                            const bool eligible = is_eligible(r, own, block, whole);
                            const bool of_scan = is_eligible(r, scan, block, shared);
                            ASSERT_TRUE(!eligible || of_scan);
                            listable += eligible;
                            more += !eligible && of_scan;
                        }
                        ASSERT_TRUE(listable == 0 || more <= 2 * kMoreEligible) << more;
                    }
                }
    for (int64_t budget = 0; budget < 200; ++budget)
        ASSERT_GE(shortlist_width(Refinement::kUnits, budget) - 2 * kMoreEligible, budget);
}

TEST(Geometry, SupportPredicatesMatchTheDefinition) {
    for (int64_t kv_len : {0, 1, 5, 12})
        for (int64_t window = 0; window <= 14; ++window)
            for (int64_t anchors = 0; anchors <= 14; ++anchors)
                for (bool causal : {true, false})
                    for (int64_t p = -9; p < kv_len; ++p)
                        for (int64_t j = -2; j <= kv_len + 2; ++j) {
                            Ranges r{kv_len, window, anchors, causal};
                            bool exists = j >= 0 && j < kv_len;
                            ASSERT_EQ(is_visible(r, p, j), exists && sees(r, p, j));
                            ASSERT_EQ(in_ranges(r, p, j), exists && ranged(r, p, j));
                            ASSERT_EQ(in_support(r, p, j, true), exists && sees(r, p, j));
                            ASSERT_EQ(in_support(r, p, j, false), exists && ranged(r, p, j));
                        }
}

TEST(Geometry, EligibleMeansSomeKeyIsOutsideTheRanges) {
    for_each_case([](const Case& c) {
        for_each_tile(c, [&](int64_t, TileSpan t) {
            for (int64_t block = 0; block <= num_blocks(c.ranges.kv_len); ++block)
                ASSERT_EQ(is_eligible(c.ranges, t, block), look(c, t, block).any_outside)
                    << describe(c, t, block);
        });
    });
}

TEST(Geometry, TheFarFieldListsNoBlockOfAnchorsOrWindows) {
    for_each_case([](const Case& c) {
        for_each_tile(c, [&](int64_t, TileSpan t) {
            for (int64_t block = 0; block <= num_blocks(c.ranges.kv_len); ++block) {
                const bool any = is_eligible(c.ranges, t, block);
                const bool walked = RangeBlocks(c.ranges, t).contains(static_cast<int>(block));
                ASSERT_EQ(is_eligible(c.ranges, t, block, WholeBlocks::kAll), any && !walked)
                    << describe(c, t, block);
            }
        });
    });
}

TEST(Geometry, BlockCoverIsExactForNoneAndFull) {
    for_each_case([](const Case& c) {
        for_each_tile(c, [&](int64_t, TileSpan t) {
            for (int64_t block = 0; block <= num_blocks(c.ranges.kv_len); ++block) {
                Facts f = look(c, t, block);
                BlockCover listed = !f.any_visible  ? BlockCover::kNone
                                    : f.all_visible ? BlockCover::kFull
                                                    : BlockCover::kPartial;
                ASSERT_EQ(block_cover(c.ranges, t, block, true), listed) << describe(c, t, block);
                BlockCover found = block_cover(c.ranges, t, block, false);
                ASSERT_EQ(found == BlockCover::kNone, !f.any_ranged) << describe(c, t, block);
                // A block half anchor, half window is full to every row, yet may be called partial.
                ASSERT_TRUE(found != BlockCover::kFull || f.all_ranged) << describe(c, t, block);
                ASSERT_TRUE(found == BlockCover::kFull || !f.all_ranged || f.any_anchor)
                    << describe(c, t, block);
            }
        });
    });
}

TEST(Geometry, AnchorAndWindowBlocksAreThoseThatHoldSuchKeys) {
    for_each_case([](const Case& c) {
        for_each_tile(c, [&](int64_t, TileSpan t) {
            BlockRange anchors = anchor_blocks(c.ranges, t), window = window_blocks(c.ranges, t);
            ASSERT_LE(anchors.begin, anchors.end);
            ASSERT_LE(window.begin, window.end);
            ASSERT_LE(std::max(anchors.end, window.end), num_blocks(c.ranges.kv_len));
            for (int64_t block = 0; block < num_blocks(c.ranges.kv_len); ++block) {
                Facts f = look(c, t, block);
                ASSERT_EQ(block >= anchors.begin && block < anchors.end, f.any_anchor)
                    << describe(c, t, block);
                ASSERT_EQ(block >= window.begin && block < window.end, f.any_window)
                    << describe(c, t, block);
                ASSERT_EQ(RangeBlocks(c.ranges, t).contains(static_cast<int>(block)),
                          f.any_anchor || f.any_window)
                    << describe(c, t, block);
            }
        });
    });
}

TEST(Geometry, ACoveringBudgetLeavesNothingOut) {
    for_each_case([](const Case& c) {
        int64_t most_keys = 0, most_blocks = 0;
        for (int64_t i = 0; i < c.query_len; ++i) {
            int64_t p = query_position(i, c.query_len, c.ranges.kv_len), keys = 0;
            for (int64_t j = 0; j < c.ranges.kv_len; ++j)
                keys += sees(c.ranges, p, j) && !ranged(c.ranges, p, j);
            most_keys = std::max(most_keys, keys);
        }
        for_each_tile(c, [&](int64_t, TileSpan t) {
            int64_t blocks = 0;
            for (int64_t block = 0; block < num_blocks(c.ranges.kv_len); ++block)
                blocks += is_eligible(c.ranges, t, block);
            most_blocks = std::max(most_blocks, blocks);
        });
        ASSERT_GE(max_candidates(c.ranges, Selector::kExact), most_keys);
        ASSERT_GE(max_candidates(c.ranges, Selector::kBlock), most_blocks);
        for (int64_t topk = 0; topk <= 256; topk += 16) {
            ASSERT_TRUE(!budget_covers(c.ranges, topk, Selector::kExact) || topk >= most_keys);
            ASSERT_TRUE(!budget_covers(c.ranges, topk, Selector::kBlock) ||
                        topk / kBlockKeys >= most_blocks);
        }
        // With causality the last query decides, so the bound is exact and no selection is wasted.
        if (c.ranges.causal) {
            ASSERT_EQ(max_candidates(c.ranges, Selector::kExact), most_keys);
            ASSERT_EQ(max_candidates(c.ranges, Selector::kBlock), most_blocks);
        }
    });
}

constexpr UnitLevel kLevels[] = {kShortUnits, kCoarseUnits, kQuestUnits, kMeanUnits};

TEST(Geometry, UnitsAreVisibleFromTheirLastKeyOn) {
    for (UnitLevel level : kLevels)
        for (int64_t kv_len : {0, 1, 3, 4, 17, 63, 64, 65, 130}) {
            const int keys = level.keys;
            ASSERT_EQ(keys * level.per_block, kBlockKeys);
            for (int64_t unit = 0; unit < num_blocks(kv_len) * level.per_block; ++unit)
                for (int64_t p = -3; p < kv_len; ++p) {
                    int64_t held = 0, seen = 0;
                    for (int64_t j = unit * keys; j < (unit + 1) * keys && j < kv_len; ++j) {
                        ++held;
                        seen += j <= p;
                    }
                    Ranges r{kv_len, 0, 0, true};
                    ASSERT_EQ(is_unit_visible(r, p, unit, keys), held > 0 && seen == held);
                    r.causal = false;
                    ASSERT_EQ(is_unit_visible(r, p, unit, keys), held > 0);
                }
        }
}

TEST(Geometry, EveryUnitHasASummaryRowOfItsOwnBesideThoseOfItsBlock) {
    const int64_t kv_len = 64 * 3 + 1;
    for (Selector selector : {Selector::kBlock, Selector::kQuest, Selector::kMean}) {
        std::vector<int64_t> block_of(static_cast<size_t>(summary_rows(selector, kv_len)), -1);
        for (UnitLevel level : kLevels) {
            const bool is_mean = level.per_block == 1 && level.first_row == 0;
            const bool is_quest = level.per_block == 4 && level.first_row == 0;
            const Selector owner = is_mean    ? Selector::kMean
                                   : is_quest ? Selector::kQuest
                                              : Selector::kBlock;
            if (owner != selector) continue;
            for (int64_t unit = 0; unit < num_blocks(kv_len) * level.per_block; ++unit) {
                int64_t row = summary_row(level, rows_per_block(selector), unit);
                ASSERT_EQ(block_of.at(static_cast<size_t>(row)), -1);
                block_of.at(static_cast<size_t>(row)) = unit * level.keys / kBlockKeys;
            }
        }
        for (size_t row = 0; row < block_of.size(); ++row)
            ASSERT_EQ(block_of[row], static_cast<int64_t>(row) / rows_per_block(selector));
    }
    EXPECT_EQ(summary_row(kShortUnits, 9, 8), 9);
    EXPECT_EQ(summary_row(kShortUnits, 9, 21), 2 * 9 + 5);
    EXPECT_EQ(summary_row(kCoarseUnits, 9, 3), 3 * 9 + 8);
}

TEST(Geometry, ExtremeSizesDoNotOverflow) {
    const int64_t huge = (int64_t{1} << 31) - 1;
    for (bool causal : {true, false}) {
        Ranges r{huge, huge, huge, causal};
        TileSpan t = tile_span(num_tiles(huge, 1) - 1, 64, huge, huge);
        EXPECT_EQ(t.last, huge - 1);
        EXPECT_EQ(window_blocks(r, t).end, num_blocks(huge));
        EXPECT_EQ(anchor_blocks(r, t).end, num_blocks(huge));
        EXPECT_TRUE(budget_covers(r, 0, Selector::kBlock));
        EXPECT_FALSE(is_eligible(r, t, 0));
    }
}

}  // namespace
}  // namespace condensate
