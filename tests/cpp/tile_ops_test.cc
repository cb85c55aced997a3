// Every instruction set's tile operations against plain loops.
#include "cpu/tile_ops.h"

#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "host/number.h"

namespace condensate::cpu {
namespace {

std::vector<const TileOps*> all_tables() {
    const TileOps* tables[kMaxTileOps];
    list_tile_ops(tables);
    std::vector<const TileOps*> found;
    for (const TileOps* table : tables)
        if (table != nullptr) found.push_back(table);
    return found;
}

bool same(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }

TEST(Number, EveryHalfSurvivesTheRoundTrip) {
    for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
        uint16_t half = static_cast<uint16_t>(bits);
        float x = float16_to_float(half), y = bfloat16_to_float(half);
        ASSERT_TRUE(x != x || float_to_float16(x) == half);
        ASSERT_TRUE(y != y || float_to_bfloat16(y) == half);
        ASSERT_EQ(x != x, (bits & 0x7fffu) > 0x7c00u);
    }
    EXPECT_EQ(float16_to_float(0x0001), 0x1p-24f);
    EXPECT_EQ(float16_to_float(0x7bff), 65504.0f);
}

TEST(Number, RoundingIsToNearestEven) {
    for (uint32_t bits = 0; bits < 0x7bffu; ++bits) {
        float low = float16_to_float(static_cast<uint16_t>(bits));
        float high = float16_to_float(static_cast<uint16_t>(bits + 1)), middle = (low + high) / 2;
        uint32_t even = bits + (bits & 1u);
        ASSERT_EQ(float_to_float16(middle), even);
        ASSERT_EQ(float_to_float16(std::nextafter(middle, 0.0f)), bits);
        ASSERT_EQ(float_to_float16(std::nextafter(middle, INFINITY)), bits + 1);
        ASSERT_EQ(float_to_float16(-middle), even | 0x8000u);
    }
    EXPECT_EQ(float_to_float16(65519.9f), 0x7bffu);
    EXPECT_EQ(float_to_float16(65520.0f), 0x7c00u);
    EXPECT_EQ(float_to_bfloat16(1.0f + 0x1p-8f), 0x3f80u);
    EXPECT_EQ(float_to_bfloat16(1.0f + 0x3p-8f), 0x3f82u);
    EXPECT_EQ(float_to_bfloat16(std::numeric_limits<float>::max()), 0x7f80u);
    EXPECT_EQ(float_to_bfloat16(NAN) & 0x7fffu, 0x7fc0u);
}

TEST(TileOps, LoadConvertsEveryHalfAndPads) {
    std::vector<uint16_t> halves(0x10000);
    for (size_t n = 0; n < halves.size(); ++n) halves[n] = static_cast<uint16_t>(n);
    for (const TileOps* ops : all_tables())
        for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
            std::vector<float> line(32, -1.0f);
            for (size_t n = 0; n < halves.size(); n += 24) {
                int count = static_cast<int>(std::min<size_t>(24, halves.size() - n));
                bool finite =
                    ops->load_rows(dtype, halves.data() + n, 0, 1, count, line.data(), 32);
                bool expected = true;
                for (int d = 0; d < 32; ++d) {
                    float x = d < count ? load_number(dtype, halves.data(), int64_t(n) + d) : 0.0f;
                    expected = expected && std::isfinite(x);
                    ASSERT_TRUE(same(line[size_t(d)], x)) << ops->name << " " << n << " " << d;
                }
                ASSERT_EQ(finite, expected) << ops->name << " " << n;
            }
        }
}

// Scores of integers are exact, so every table must give the same.
TEST(TileOps, ScoresAreDotProducts) {
    for (int dim : {8, 24, 64, 136})
        for (int panels : {1, 2, 3, 8}) {
            const size_t d_count = static_cast<size_t>(dim);
            std::vector<float> queries(static_cast<size_t>(panels) * d_count * kPanelRows);
            std::vector<float> keys(kTileKeys * d_count), scores(kTileKeys * kScoreStride, NAN);
            for (size_t n = 0; n < queries.size(); ++n) queries[n] = float(n * 7 % 11) - 5;
            for (size_t n = 0; n < keys.size(); ++n) keys[n] = float(n * 5 % 13) - 6;
            for (const TileOps* ops : all_tables()) {
                ops->score(queries.data(), keys.data(), dim, dim, panels, 0.5f, scores.data());
                for (int key = 0; key < kTileKeys; ++key)
                    for (int row = 0; row < panels * kPanelRows; ++row) {
                        float sum = 0;
                        for (int d = 0; d < dim; ++d)
                            sum += queries[size_t((row / kPanelRows * dim + d) * kPanelRows +
                                                  row % kPanelRows)] *
                                   keys[size_t(key * dim + d)];
                        ASSERT_EQ(scores[size_t(key * kScoreStride + row)], 0.5f * sum)
                            << ops->name;
                    }
            }
        }
}

TEST(TileOps, SoftmaxWeightsAreExponentials) {
    for (const TileOps* ops : all_tables()) {
        double worst = 0;
        for (int part = 0; part < 40; ++part) {
            std::vector<float> scores(kTileKeys * kScoreStride, 0.0f), before;
            for (int n = 0; n < kTileKeys * kPanelRows; ++n)
                scores[size_t(n / kPanelRows * kScoreStride + n % kPanelRows)] =
                    -87.0f * float(part * 1024 + n) / 40960.0f;
            before = scores;
            SoftmaxState state{};  // maximum 0
            ops->softmax(1, scores.data(), &state);
            for (int key = 0; key < kTileKeys; ++key)
                for (int row = 0; row < kPanelRows; ++row) {
                    size_t at = size_t(key * kScoreStride + row);
                    double exact = std::exp(double(before[at]));
                    worst = std::max(worst, std::fabs(double(scores[at]) - exact) / exact);
                }
        }
        EXPECT_LT(worst, 0x1p-23) << ops->name;
    }
}

TEST(TileOps, SoftmaxKeepsNanAndForgetsMinusInfinity) {
    for (const TileOps* ops : all_tables()) {
        std::vector<float> scores(kTileKeys * kScoreStride, -INFINITY);
        scores[3 * kScoreStride + 1] = 5.0f;
        scores[4 * kScoreStride + 2] = NAN;
        SoftmaxState state{};
        for (float& max : state.max) max = -INFINITY;
        ops->softmax(1, scores.data(), &state);
        EXPECT_EQ(state.max[0], -INFINITY);
        EXPECT_EQ(state.sum[0], 0.0f);
        EXPECT_EQ(state.max[1], 5.0f);
        EXPECT_EQ(state.sum[1], 1.0f);
        EXPECT_TRUE(std::isnan(state.sum[2]));
        for (int key = 0; key < kTileKeys; ++key) EXPECT_EQ(scores[size_t(key) * kScoreStride], 0);
    }
}

TEST(TileOps, SumsStayAccurateOverManyTiles) {
    for (const TileOps* ops : all_tables()) {
        SoftmaxState state{};
        std::vector<float> scores(kTileKeys * kScoreStride);
        const int tiles = 20000;
        for (int n = 0; n < tiles; ++n) {
            for (float& score : scores) score = -1.0f;  // 1/e is not a dyadic number
            ops->softmax(1, scores.data(), &state);
        }
        double exact = double(tiles) * kTileKeys * std::exp(-1.0);
        EXPECT_NEAR(double(state.sum[0]) / exact, 1.0, 0x1p-22) << ops->name;
    }
}

TEST(TileOps, AccumulateIsAProduct) {
    for (const TileOps* ops : all_tables())
        for (int ld : {16, 48, 64, 144}) {
            const int rows = 12;
            std::vector<float> weights(kTileKeys * kScoreStride), values(size_t(kTileKeys * ld));
            std::vector<float> out(size_t(16 * ld), 2.0f), rescale(kMaxRows, 0.5f);
            for (size_t n = 0; n < weights.size(); ++n) weights[n] = float(n * 3 % 7);
            for (size_t n = 0; n < values.size(); ++n) values[n] = float(n * 5 % 9) - 4;
            ops->accumulate(weights.data(), values.data(), ld, rows, rescale.data(), out.data());
            for (int row = 0; row < 16; ++row)
                for (int d = 0; d < ld; ++d) {
                    float sum = row < rows ? 1.0f : 2.0f;
                    for (int key = 0; key < kTileKeys && row < rows; ++key)
                        sum += weights[size_t(key * kScoreStride + row)] *
                               values[size_t(key * ld + d)];
                    ASSERT_EQ(out[size_t(row * ld + d)], sum) << ops->name << " " << row;
                }
        }
}

TEST(TileOps, BlockSumsSeeOnlyVisibleScores) {
    for (const TileOps* ops : all_tables())
        for (int units : {1, 4, 8, 64}) {
            std::vector<float> scores(kTileKeys * kScoreStride);
            std::vector<int32_t> end(kMaxRows);
            for (int row = 0; row < kPanelRows; ++row) {
                end[size_t(row)] = row * 4 + row % 4;
                for (int key = 0; key < kTileKeys; ++key)
                    scores[size_t(key * kScoreStride + row)] =
                        key < end[size_t(row)] ? float((key * 7 + row) % 5) : NAN;
            }
            scores[1 * kScoreStride + 8] = -INFINITY;  // weighs nothing
            scores[2 * kScoreStride + 9] = INFINITY;
            scores[2 * kScoreStride + 10] = NAN;
            std::vector<float> max(kTileKeys * kPanelRows, -7.0f), sum = max;
            ops->block_sums(scores.data(), units, end.data(), 1, max.data(), sum.data());
            for (int block = 0; block < kTileKeys / units; ++block)
                for (int row = 0; row < kPanelRows; ++row) {
                    float best = -INFINITY;
                    double total = 0;
                    for (int key = block * units; key < (block + 1) * units; ++key) {
                        if (key >= end[size_t(row)]) continue;
                        float x = scores[size_t(key * kScoreStride + row)];
                        best = x > best ? x : best;
                        total += std::exp(double(x));
                    }
                    const size_t at = size_t(block * kPanelRows + row);
                    ASSERT_EQ(max[at], best) << ops->name << " " << units << " " << row;
                    double expected = std::isnan(total)     ? 0
                                      : std::isfinite(best) ? total / std::exp(double(best))
                                      : best > 0            ? 1
                                                            : 0;
                    ASSERT_NEAR(double(sum[at]), expected, 1e-6 * expected) << ops->name;
                }
        }
}

TEST(TileOps, BlockMassesOverflowToTheLargestFloat) {
    constexpr float kLargest = std::numeric_limits<float>::max();
    struct {
        float max, sum, norm_max, norm_inverse;
        double mass;
    } const cases[] = {
        {3.0f, 2.0f, 5.0f, 0.25f, 0.5 * std::exp(-2.0)},
        {-INFINITY, 0.0f, 5.0f, 0.25f, 0},                        // sees nothing of the block
        {50.0f, 3.0f, 0.0f, 0.5f, 1.5 * std::exp(50.0)},          // far above the norm
        {90.0f, 1.0f, 0.0f, 0x1p-10f, 0x1p-10 * std::exp(90.0)},  // though exp(90) overflows
        {90.0f, 1.0f, 0.0f, 1.0f, double{kLargest}},
        {INFINITY, 1.0f, 3.0f, 1e-8f, double{kLargest}},
        {INFINITY, 1.0f, 0.0f, 0.0f, 0},  // a row without masses
        {7.0f, 1.0f, 0.0f, 0.0f, 0},
        {-200.0f, 4.0f, 0.0f, 1.0f, 0},
    };
    for (const TileOps* ops : all_tables())
        for (const auto& c : cases) {
            std::vector<float> max(kPanelRows, -INFINITY), sum(kPanelRows), norm(kPanelRows),
                inverse(kPanelRows), mass(kPanelRows, -1.0f);
            max[5] = c.max;
            sum[5] = c.sum;
            norm[5] = c.norm_max;
            inverse[5] = c.norm_inverse;
            float largest = ops->block_mass(max.data(), sum.data(), norm.data(), inverse.data(), 1,
                                            mass.data());
            ASSERT_NEAR(double(mass[5]), c.mass, 1e-6 * c.mass) << ops->name << " " << c.max;
            ASSERT_EQ(largest, mass[5]);
            ASSERT_EQ(mass[4], 0.0f);
        }
}

TEST(TileOps, LogSumExpOfEveryLength) {
    for (const TileOps* ops : all_tables())
        for (int64_t n = 0; n < 300; ++n) {
            std::vector<float> scores(static_cast<size_t>(n));
            double sum = 0;
            for (size_t j = 0; j < scores.size(); ++j) {
                scores[j] = float(j % 17) - 20.0f;
                sum += std::exp(double(scores[j]));
            }
            float found = ops->log_sum_exp(scores.data(), n);
            if (n == 0) {
                ASSERT_EQ(found, -INFINITY);
                continue;
            }
            ASSERT_NEAR(double(found), std::log(sum), 4e-6) << ops->name << " " << n;
        }
}

TEST(TileOps, OrderKeysKeepTheOrder) {
    const std::vector<float> ascending = {-INFINITY, -1e30f, -2.0f, -1e-45f, 0.0f,
                                          1e-45f,    1.0f,   3e38f, INFINITY};
    for (const TileOps* ops : all_tables()) {
        std::vector<uint32_t> keys(ascending.size());
        ops->order_keys(ascending.data(), int64_t(ascending.size()), keys.data());
        for (size_t n = 1; n < keys.size(); ++n) ASSERT_LT(keys[n - 1], keys[n]) << n;
        const float special[] = {-0.0f, NAN, -NAN};
        uint32_t found[3];
        ops->order_keys(special, 3, found);
        EXPECT_EQ(found[0], keys[4]);
        EXPECT_EQ(found[1], 0u);
        EXPECT_EQ(found[2], 0u);
        EXPECT_GT(keys[0], 0u);
    }
}

}  // namespace
}  // namespace condensate::cpu
