#include "condensate/tile.h"

#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "condensate/block_walk.h"
#include "condensate/kv_view.h"

namespace condensate {
namespace {

Problem problem(int64_t query_len, int64_t kv_len, int64_t window, int64_t anchors, bool causal) {
    Problem p;
    p.batch = 2;
    p.query_heads = 6;
    p.kv_heads = 2;
    p.query_len = query_len;
    p.kv_len = kv_len;
    p.window = window;
    p.anchors = anchors;
    p.causal = causal;
    return p;
}

TEST(Tile, ItsRowsAreEveryQueryOfEveryHeadOnce) {
    const Problem p = problem(75, 300, 0, 0, true);
    std::vector<int> seen(static_cast<size_t>(p.batch * p.query_heads * p.query_len), 0);
    const int64_t tiles = num_tiles(p.query_len, p.group()), heads = p.batch * p.kv_heads;
    std::set<int64_t> indices;
    for (int64_t n = 0; n < heads * tiles; ++n) {
        const Tile tile = Tile::longest_first(p, n);
        indices.insert(tile.index);
        EXPECT_EQ(tile.flat_kv_head(p) * tiles + tile.first_query / tile.positions, tile.index);
        int rows = 0;
        for (int row = 0; row < tile.rows(); ++row) {
            if (!tile.exists(row)) continue;
            ++rows;
            ++seen[static_cast<size_t>(tile.flat_row(p, row))];
            EXPECT_EQ(tile.head(row) / p.group(), tile.kv_head);
            EXPECT_EQ(tile.position(row), tile.query(row) + 300 - 75);
            EXPECT_LE(tile.span().first, tile.position(row));
            EXPECT_GE(tile.span().last, tile.position(row));
        }
        EXPECT_EQ(rows, tile.queries() * tile.group);
        EXPECT_EQ(tile.span().last, tile.position_of(tile.end_query() - 1));
    }
    EXPECT_EQ(static_cast<int64_t>(indices.size()), heads * tiles);
    for (int times : seen) EXPECT_EQ(times, 1);
}

TEST(KvView, FindsRowsByTheTensorsStrides) {
    static const float elements[3251] = {};
    const ConstTensor4 tensor = {elements, 1000, 100, 10};
    const KvView view = KvView::of(tensor, sizeof(float), 3, 2);
    EXPECT_EQ(view.row<float>(5), elements + 3250);
    EXPECT_EQ(view.row(5, sizeof(float)), elements + 3250);
}

// The blocks of which some row attends a key, by the definition of a row's support.
std::vector<int> attended_blocks(const Problem& p, const Tile& tile, const std::set<int>& listed) {
    std::vector<int> blocks;
    for (int block = 0; block < num_blocks(p.kv_len); ++block) {
        bool attended = false;
        for (int64_t i = tile.first_query; i < tile.end_query(); ++i)
            for (int64_t j = block * kBlockKeys; j < (block + 1) * kBlockKeys; ++j)
                attended |= in_support(tile.ranges(p), tile.position_of(i), j, listed.count(block));
        if (attended) blocks.push_back(block);
    }
    return blocks;
}

TEST(BlockWalk, VisitsWhatSomeRowAttendsOnceAndSkipsInvalidEntries) {
    const std::vector<int32_t> list = {1, 3, 2, 3, 4, 4, -7, 9, 11, 1000, 12};
    const std::set<int> valid = {1, 3, 4, 9, 11, 12};
    for (bool causal : {true, false})
        for (int64_t window : {0, 1, 64, 100, 900})
            for (int64_t anchors : {0, 1, 64, 65, 200})
                for (int64_t kv_len : {832, 801, 780}) {
                    const Problem p = problem(75, kv_len, window, anchors, causal);
                    for (int64_t index = 0; index < num_tiles(p.query_len, p.group()); ++index) {
                        const Tile tile(p, 0, index);
                        const int64_t size = static_cast<int64_t>(list.size());
                        BlockWalk walk(tile.ranges(p), tile.span(), {list.data(), size, size});
                        std::vector<int> visited;
                        for (BlockWalk::Step step = walk.next(); step.block != INT_MAX;
                             step = walk.next()) {
                            visited.push_back(step.block);
                            EXPECT_EQ(step.listed, valid.count(step.block) == 1);
                        }
                        EXPECT_EQ(visited, attended_blocks(p, tile, valid));
                        EXPECT_EQ(walk.errors, uint32_t{kErrorBlockIndex});
                    }
                }
}

TEST(BlockWalk, ClampsTheClaimedCount) {
    const std::vector<int32_t> list = {2, 5};
    const Problem p = problem(1, 640, 0, 0, false);
    const Tile tile(p, 0, 0);
    for (int64_t claimed : {int64_t{-1}, int64_t{3}, INT64_MAX}) {
        BlockWalk walk(tile.ranges(p), tile.span(), {list.data(), claimed, 2});
        EXPECT_EQ(walk.errors, uint32_t{kErrorBlockCount});
        EXPECT_EQ(walk.next().block, claimed < 0 ? INT_MAX : 2);
    }
}

TEST(AttentionWalk, KnowsWhichBlocksNeedNoMaskAndAreSampled) {
    const std::vector<int32_t> list = {1, 2, 3, 4, 5, 6, 7, 8, 9}, counts = {9};
    AttentionParams params;
    params.problem = problem(1, 640, 20, 0, true);
    params.block_indices = list.data();
    params.block_counts = counts.data();
    params.max_blocks = 9;
    const Tile tile(params.problem, 0, 0);
    for (bool far_field : {false, true}) {
        AttentionWalk walk(params, tile, {far_field, false, true});
        for (int block = 1; block < 10; ++block) {
            const AttentionWalk::Step step = walk.next();
            EXPECT_EQ(step.block, block);
            EXPECT_TRUE(step.whole && step.full);
            EXPECT_EQ(step.sampled, block % 2 == 1);  // every second of nine
        }
        EXPECT_EQ(walk.next().block, INT_MAX);
    }
    AttentionWalk exact(params, tile, {false, true, false});
    for (int block = 0; block < 10; ++block) {
        const AttentionWalk::Step step = exact.next();
        EXPECT_EQ(step.block, block);
        EXPECT_FALSE(step.full || step.sampled);
    }
}

}  // namespace
}  // namespace condensate
