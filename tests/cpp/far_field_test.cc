// The far field: its index arithmetic against its meaning, enumerated, and the CPU kernels against
// the reference.
#include "condensate/far_field.h"

#include <algorithm>
#include <cmath>

#include <gtest/gtest.h>

#include "call.h"
#include "cpu/kernels.h"
#include "reference/far_field.h"
#include "reference/reference.h"

namespace condensate::testing {
namespace {

TEST(FarGeometry, FarEndIsWhereBlocksStopBeingSeenInFull) {
    for (int64_t kv_len = 0; kv_len <= 260; ++kv_len)
        for (int64_t first = -70; first < kv_len + 3; ++first)
            for (bool causal : {true, false}) {
                const Ranges r{kv_len, 0, 0, causal};
                auto sees_all = [&](int64_t block) {
                    for (int64_t j = block * kBlockKeys;
                         j < std::min(kv_len, (block + 1) * kBlockKeys); ++j)
                        if (!is_visible(r, first, j)) return false;
                    return true;
                };
                // Rows of a tile only ever see more than its first one.
                const int64_t end = far_end(r, {first, first + 63});
                ASSERT_GE(end, 0);
                ASSERT_LE(end, num_blocks(kv_len));
                for (int64_t block = 0; block < num_blocks(kv_len); ++block)
                    ASSERT_EQ(block < end, sees_all(block))
                        << kv_len << " keys, tile at " << first << ", block " << block;
            }
}

TEST(FarGeometry, BlocksHoldEveryKeyOnce) {
    for (int64_t kv_len = 0; kv_len <= 200; ++kv_len) {
        int64_t keys = 0;
        for (int64_t block = 0; block < num_blocks(kv_len); ++block) {
            ASSERT_GT(block_keys(kv_len, block), 0);
            keys += block_keys(kv_len, block);
        }
        ASSERT_EQ(keys, kv_len);
        ASSERT_EQ(block_keys(kv_len, num_blocks(kv_len)), 0);
    }
}

TEST(FarGeometry, PoolsAreTheSmallestPowersOfTwoThatSuffice) {
    for (int64_t blocks = 0; blocks <= 1100; ++blocks)
        for (int64_t kv_len : {blocks * 64, blocks * 64 - 63}) {
            if (kv_len < 0) continue;
            const int64_t width = far_pool_blocks(kv_len), pools = num_far_pools(kv_len);
            ASSERT_EQ(width & (width - 1), 0);
            ASSERT_LE(pools, kFarPools);
            ASSERT_GE(pools * width, blocks);
            ASSERT_LT((pools - 1) * width, std::max<int64_t>(blocks, 1)) << "an empty pool";
            ASSERT_TRUE(width == 1 || blocks > kFarPools * width / 2) << blocks;
        }
    const int64_t huge = (int64_t{1} << 31) - 1;
    EXPECT_EQ(num_far_pools(huge), 128);
    EXPECT_EQ(far_pool_blocks(huge), int64_t{1} << 18);
}

TEST(FarGeometry, AsManyListedBlocksAreSampledAsEightAllow) {
    for (int64_t count = 0; count <= 1000; ++count) {
        const int64_t stride = gap_stride(count);
        ASSERT_GE(stride, 1);
        ASSERT_LE(ceil_div(count, stride), kGapBlocks);
        if (stride > 1) {
            ASSERT_GT(ceil_div(count, stride - 1), kGapBlocks) << count;
        }
    }
    EXPECT_EQ(gap_stride(8), 1);
    EXPECT_EQ(gap_stride(9), 2);
    EXPECT_EQ(gap_stride(27), 4);
    EXPECT_EQ(gap_stride((int64_t{1} << 31) - 1), int64_t{1} << 28);
}

// Over all tiles of many small problems: attended and condensed keys are what a row sees in whole
// blocks, each once, and pools hold consecutive blocks.
TEST(FarGeometry, EveryBlockIsWalkedCondensedOrNotSeenInFull) {
    for (int64_t kv_len : {1, 64, 65, 300, 129 * 64})
        for (int64_t query_len : {1, 40, 400})
            for (int64_t window : {0, 1, 70})
                for (bool causal : {true, false}) {
                    Call call({DType::kFloat32, 1, 1, 4, query_len, kv_len, 8, window, 3, causal});
                    ASSERT_TRUE(far_pools(call.far_pools(), Executor{}).ok());
                    const AttentionParams params = call.attention();
                    const Ranges r = call.problem.ranges();
                    for (int64_t tile = 0; tile < num_tiles(query_len, 4); ++tile) {
                        const TileSpan span = tile_span(tile, tile_positions(4), query_len, kv_len);
                        std::vector<char> walked(static_cast<size_t>(num_blocks(kv_len)), 0);
                        int64_t in_full = 0, walked_keys = 0, condensed_keys = 0;
                        for (int64_t block = 0; block < num_blocks(kv_len); ++block) {
                            const bool visits = block % 3 == 1;
                            walked[static_cast<size_t>(block)] = visits;
                            if (block >= far_end(r, span)) continue;
                            in_full += block_keys(kv_len, block);
                            walked_keys += visits ? block_keys(kv_len, block) : 0;
                        }
                        const auto pools = reference::condense<double>(params, 0, 0, span, walked);
                        for (const auto& pool : pools) condensed_keys += pool.keys;
                        ASSERT_EQ(walked_keys + condensed_keys, in_full);
                        ASSERT_LE(static_cast<int64_t>(pools.size()), num_far_pools(kv_len));
                    }
                }
}

double unit(DType dtype) {
    return dtype == DType::kFloat16 ? 0x1p-11 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-24;
}

TEST(CpuFarField, PoolsMatchTheReference) {
    std::mt19937 random(7);
    for (int round = 0; round < 30; ++round) {
        Shape shape = random_shape(random, 400);
        shape.kv_len = round % 3 == 0 ? 128 * 64 + 1 + round * 300 : shape.kv_len;
        shape.query_len = 1;
        SCOPED_TRACE(describe(shape));
        Call call(shape, static_cast<uint32_t>(round));
        FarPoolsParams params = call.far_pools();
        reference::far_pools<double>(params);
        const std::vector<float> sums = call.pool_sums;
        const std::vector<unsigned char> means = call.pool_means;
        params = call.far_pools();
        ASSERT_TRUE(cpu::far_pools(params, threaded()).ok());
        // Sums of at most a few hundred keys of size 1.5.
        for (size_t n = 0; n < sums.size(); ++n) ASSERT_NEAR(call.pool_sums[n], sums[n], 2e-3);
        const auto count = static_cast<int64_t>(means.size()) / dtype_bytes(shape.dtype);
        for (int64_t at = 0; at < count; ++at) {
            const float mean = load_number(shape.dtype, means.data(), at);
            ASSERT_NEAR(load_number(shape.dtype, call.pool_means.data(), at), mean,
                        2 * unit(shape.dtype) * std::fabs(static_cast<double>(mean)) + 1e-5);
        }
    }
}

TEST(CpuFarField, AttentionMatchesTheReference) {
    std::mt19937 random(11);
    for (int round = 0; round < 24; ++round) {
        Shape shape = random_shape(random, 500);
        if (round % 4 == 0) {
            shape.kv_len = 128 * 64 + 1 + round * 200;
            shape.query_len = std::min<int64_t>(shape.query_len, 20);
        }
        SCOPED_TRACE(describe(shape));
        Call call(shape, static_cast<uint32_t>(round));
        const int64_t width = round % 2 == 0 ? 3 : 20, blocks = num_blocks(shape.kv_len);
        call.max_blocks = width;
        std::uniform_int_distribution<int64_t> entry(-1, blocks);
        for (int64_t n = 0; n < call.lists() * width; ++n)
            call.block_indices.push_back(static_cast<int32_t>(entry(random)));
        if (round % 3 != 0)  // otherwise most entries fall and are skipped
            for (int64_t n = 0; n < call.lists(); ++n)
                std::sort(call.block_indices.begin() + n * width,
                          call.block_indices.begin() + (n + 1) * width);
        call.block_counts.assign(static_cast<size_t>(call.lists()), static_cast<int32_t>(width));
        const FarPoolsParams pools = call.far_pools();
        ASSERT_TRUE(far_pools(pools, Executor{}).ok());

        uint32_t expected_errors = 0, errors = 0;
        std::vector<float> estimate(static_cast<size_t>(call.rows()), NAN), found = estimate;
        AttentionParams params = call.attention();
        params.omitted_mass_estimate = estimate.data();
        reference::attention<double>(params, &expected_errors);
        const std::vector<float> lse = call.lse;
        const std::vector<unsigned char> out = call.out;
        params = call.attention();
        params.omitted_mass_estimate = found.data();
        ASSERT_TRUE(cpu::attention(params, threaded(), &errors).ok());
        EXPECT_EQ(errors, expected_errors);
        // Rows of rounded pools may round the other way, by a unit each.
        const double close = 16 * unit(shape.dtype) + 2e-5;
        for (int64_t row = 0; row < call.rows(); ++row) {
            const float a = call.lse[static_cast<size_t>(row)], b = lse[static_cast<size_t>(row)];
            ASSERT_TRUE(a == b || std::fabs(a - b) <= close) << "LSE of row " << row;
            ASSERT_NEAR(found[static_cast<size_t>(row)], estimate[static_cast<size_t>(row)], close)
                << "estimate of row " << row;
            for (int64_t d = 0; d < shape.head_dim; ++d)
                ASSERT_NEAR(call.out_at(row, d),
                            load_number(shape.dtype, out.data(), row * shape.head_dim + d),
                            4 * close)
                    << "row " << row;
        }
    }
}

TEST(CpuFarField, ResultsDoNotDependOnThreads) {
    Call call({DType::kBFloat16, 2, 2, 4, 90, 9000, 24, 30, 10, true, 8});
    ASSERT_TRUE(far_pools(call.far_pools(), threaded()).ok());
    ASSERT_TRUE(attention(call.attention(), threaded()).ok());
    const std::vector<unsigned char> out = call.out;
    const std::vector<float> lse = call.lse;
    ASSERT_TRUE(far_pools(call.far_pools(), Executor{}).ok());
    ASSERT_TRUE(attention(call.attention(), Executor{}).ok());
    EXPECT_EQ(call.out, out);
    EXPECT_EQ(call.lse, lse);
}

}  // namespace
}  // namespace condensate::testing
