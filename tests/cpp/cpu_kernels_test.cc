// The CPU kernels against the float64 reference, within bounds derived from the arithmetic.
#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include <gtest/gtest.h>

#include "call.h"
#include "cpu/kernels.h"
#include "reference/reference.h"

namespace condensate::testing {
namespace {

constexpr double kEps = 0x1p-24;

double dtype_unit(DType dtype) {
    return dtype == DType::kFloat16 ? 0x1p-11 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-24;
}

// Largest scale * sum |q||k| over the visible keys of a row.
double score_bound(const Call& c, int64_t b, int64_t h, int64_t i) {
    const Problem& p = c.problem;
    double bound = 0;
    for (int64_t j = 0; j < p.kv_len; ++j) {
        if (!is_visible(p.ranges(), query_position(i, p.query_len, p.kv_len), j)) continue;
        double sum = 0;
        for (int64_t d = 0; d < p.head_dim; ++d)
            sum += std::fabs(static_cast<double>(c.query.get(b, h, i, d)) *
                             static_cast<double>(c.key.get(b, h / p.group(), j, d)));
        bound = std::max(bound, std::fabs(static_cast<double>(p.scale)) * sum);
    }
    return bound;
}

// Runs the reference in float64 with float32 results on `value`; lists and thresholds as in `c`.
std::vector<float> reference_out(Call& c, const Tensor& value, std::vector<float>* lse) {
    Tensor query = c.query.map([](float x) { return x; });
    Tensor key = c.key.map([](float x) { return x; });
    AttentionParams p = c.attention();
    std::vector<float> out(static_cast<size_t>(c.rows() * p.problem.head_dim));
    lse->resize(static_cast<size_t>(c.rows()));
    p.problem.dtype = DType::kFloat32;
    p.query = query.view;
    p.key = key.view;
    p.value = value.view;
    p.out = out.data();
    p.lse = lse->data();
    uint32_t errors = 0;
    reference::attention<double>(p, &errors);
    return out;
}

// The project's correctness bound; A = sum p|v| comes from the reference on |value|.
void expect_within_bound(Call& c, const std::string& what) {
    std::vector<float> lse, unused;
    std::vector<float> ref = reference_out(c, c.value.map([](float x) { return x; }), &lse);
    std::vector<float> abs =
        reference_out(c, c.value.map([](float x) { return std::fabs(x); }), &unused);
    uint32_t errors = 0;
    AttentionParams params = c.attention();
    Status status = cpu::attention(params, threaded(), &errors);
    ASSERT_TRUE(status.ok()) << status.message;
    const Problem& p = c.problem;
    const double u = dtype_unit(p.dtype), n = static_cast<double>(p.kv_len);
    for (int64_t row = 0; row < c.rows(); ++row) {
        const int64_t b = row / p.query_len / p.query_heads;
        const double s = score_bound(c, b, row / p.query_len % p.query_heads, row % p.query_len);
        const double dim = static_cast<double>(p.head_dim);
        const double ref_lse = static_cast<double>(lse[static_cast<size_t>(row)]);
        const double got_lse = static_cast<double>(c.lse[static_cast<size_t>(row)]);
        ASSERT_TRUE(ref_lse == got_lse ||
                    std::fabs(got_lse - ref_lse) <= 4 * kEps * (s + std::fabs(ref_lse) + 16))
            << what << " row " << row << ": LSE " << got_lse << ", expected " << ref_lse;
        for (int64_t d = 0; d < p.head_dim; ++d) {
            const size_t at = static_cast<size_t>(row * p.head_dim + d);
            const double r = static_cast<double>(ref[at]), a = static_cast<double>(abs[at]);
            const double bound = u * (a + std::fabs(r)) * (1 + 2 * u) +
                                 (2 * (dim + 4) * kEps * s + (n + 16) * kEps) * a +
                                 (p.dtype == DType::kFloat16 ? 0x1p-25 : 0);  // subnormals
            ASSERT_LE(std::fabs(static_cast<double>(c.out_at(row, d)) - r), bound)
                << what << " row " << row << " d " << d;
        }
    }
}

TEST(CpuAttention, RandomRangesAndListsAreWithinTheBound) {
    std::mt19937 random(11);
    for (int n = 0; n < 150; ++n) {
        Shape shape = random_shape(random, 260);
        Call c(shape, 100 + static_cast<uint32_t>(n));
        const int64_t blocks = num_blocks(shape.kv_len);
        c.max_blocks = n % 3 == 0 ? 0 : n % 5;
        c.block_indices.assign(static_cast<size_t>(c.lists() * c.max_blocks), -1);
        c.block_counts.assign(static_cast<size_t>(c.lists()), 0);
        for (int64_t list = 0; list < c.lists() && c.max_blocks > 0; ++list) {
            std::set<int32_t> chosen;
            for (int64_t k = 0; k < c.max_blocks && blocks > 0; ++k)
                chosen.insert(static_cast<int32_t>(random() % static_cast<uint64_t>(blocks)));
            std::copy(chosen.begin(), chosen.end(), c.block_indices.begin() + list * c.max_blocks);
            c.block_counts[static_cast<size_t>(list)] = static_cast<int32_t>(chosen.size());
        }
        expect_within_bound(c, describe(shape) + " case " + std::to_string(n));
        if (::testing::Test::HasFatalFailure()) return;
    }
}

TEST(CpuAttention, SelectedTokensAreAttended) {
    std::mt19937 random(12);
    for (int n = 0; n < 60; ++n) {
        Shape shape = random_shape(random, 200);
        // Small integers: scores are exact, so float32 and float64 select the same keys.
        Call c(shape, 300 + static_cast<uint32_t>(n), /*integers=*/true);
        Status status = cpu::select_tokens(c.select_tokens(n % 4 * 13), threaded());
        ASSERT_TRUE(status.ok());
        expect_within_bound(c, describe(shape) + " case " + std::to_string(n));
        if (::testing::Test::HasFatalFailure()) return;
    }
}

TEST(CpuAttention, ResultsDoNotDependOnThreads) {
    Shape shape{DType::kBFloat16, 2, 2, 4, 150, 400, 72, 50, 10, true, 0};
    Call c(shape);
    uint32_t errors = 0;
    ASSERT_TRUE(cpu::attention(c.attention(), Executor{}, &errors).ok());
    std::vector<unsigned char> out = c.out;
    std::vector<float> lse = c.lse;
    ASSERT_TRUE(cpu::attention(c.attention(), threaded(), &errors).ok());
    EXPECT_EQ(out, c.out);
    EXPECT_EQ(lse, c.lse);
}

TEST(CpuAttention, HostileListsAreSkippedAndReported) {
    Shape shape{DType::kFloat32, 1, 1, 2, 64, 400, 16, 8, 4, true, 0};
    Call c(shape);
    c.max_blocks = 6;
    c.block_counts = {6};
    c.block_indices = {3, -5, 2, 3, 1000000, 5};  // only 3 and 5 are valid in order
    uint32_t errors = 0, unused = 0;
    ASSERT_TRUE(cpu::attention(c.attention(), threaded(), &errors).ok());
    EXPECT_EQ(errors, kErrorBlockIndex);
    std::vector<unsigned char> hostile = c.out;
    c.block_indices = {3, 5, -1, -1, -1, -1};
    c.block_counts = {2};
    ASSERT_TRUE(cpu::attention(c.attention(), threaded(), &unused).ok());
    EXPECT_EQ(unused, 0u);
    EXPECT_EQ(hostile, c.out);

    for (int32_t count : {-1, 7, INT32_MIN, INT32_MAX}) {
        c.block_indices = {0, 1, 2, 3, 4, 5};
        c.block_counts = {count};
        errors = 0;
        ASSERT_TRUE(cpu::attention(c.attention(), threaded(), &errors).ok());
        EXPECT_EQ(errors, kErrorBlockCount);
    }
}

TEST(CpuAttention, KeysThatAreNotAttendedMayHoldAnything) {
    for (float poison : {NAN, INFINITY}) {
        Shape shape{DType::kFloat32, 1, 1, 1, 40, 100, 24, 5, 3, true, 0};
        Call c(shape);
        uint32_t errors = 0;
        ASSERT_TRUE(cpu::attention(c.attention(), Executor{}, &errors).ok());
        std::vector<unsigned char> clean = c.out;
        for (int64_t j = 10; j < 50; ++j)  // rows are at positions 60.., windows start at 56
            for (int64_t d = 0; d < 24; ++d) {
                c.key.set(0, 0, j, d, poison);
                c.value.set(0, 0, j, d, poison);
            }
        ASSERT_TRUE(cpu::attention(c.attention(), Executor{}, &errors).ok());
        for (int64_t row = 0; row < 40; ++row)
            for (int64_t d = 0; d < 24; ++d)
                ASSERT_NEAR(c.out_at(row, d),
                            load_number(DType::kFloat32, clean.data(), row * 24 + d), 1e-5);
    }
}

TEST(CpuAttention, NanInAnAttendedKeyOrValueReachesItsRows) {
    Shape shape{DType::kFloat16, 1, 1, 1, 20, 20, 8, 4, 0, true, 0};
    for (bool in_key : {true, false}) {
        Call c(shape);
        (in_key ? c.key : c.value).set(0, 0, 9, 3, NAN);
        uint32_t errors = 0;
        ASSERT_TRUE(cpu::attention(c.attention(), Executor{}, &errors).ok());
        for (int64_t row = 0; row < 20; ++row) {
            bool sees = row >= 9 && row < 13;
            EXPECT_EQ(std::isnan(c.out_at(row, 3)), sees) << row;
            EXPECT_EQ(std::isnan(c.out_at(row, 0)), sees && in_key) << row;
            EXPECT_EQ(std::isnan(c.lse[static_cast<size_t>(row)]), sees && in_key) << row;
        }
    }
}

TEST(CpuAttention, RowsWithoutKeysAreZero) {
    Shape shape{DType::kBFloat16, 1, 1, 2, 10, 4, 8, 3, 1, true, 0};
    Call c(shape);
    uint32_t errors = 0;
    ASSERT_TRUE(cpu::attention(c.attention(), Executor{}, &errors).ok());
    for (int64_t row = 0; row < 20; ++row) {
        bool empty = row % 10 < 6;
        EXPECT_EQ(c.lse[static_cast<size_t>(row)] == -INFINITY, empty) << row;
        for (int64_t d = 0; d < 8 && empty; ++d) EXPECT_EQ(c.out_at(row, d), 0.0f);
    }
}

TEST(CpuTokenSelect, MatchesTheReferenceExactlyOnIntegers) {
    std::mt19937 random(13);
    for (int n = 0; n < 120; ++n) {
        Shape shape = random_shape(random, 300);
        Call c(shape, 500 + static_cast<uint32_t>(n), /*integers=*/true);
        const int64_t topk = n % 7 == 0 ? 0 : static_cast<int64_t>(random() % 200);
        ASSERT_TRUE(cpu::select_tokens(c.select_tokens(topk), threaded()).ok());
        std::vector<float> threshold = c.threshold, lse = c.lse_full;
        std::vector<int32_t> tie = c.tie_index;
        reference::select_tokens<double>(c.select_tokens(topk));
        ASSERT_EQ(threshold, c.threshold) << describe(shape) << " topk " << topk;
        ASSERT_EQ(tie, c.tie_index) << describe(shape) << " topk " << topk;
        for (size_t row = 0; row < lse.size(); ++row)
            ASSERT_TRUE(lse[row] == c.lse_full[row] || std::fabs(lse[row] - c.lse_full[row]) < 1e-4)
                << lse[row] << " " << c.lse_full[row];
    }
}

TEST(CpuTokenSelect, NanIsNeverSelectedAndZerosTie) {
    Shape shape{DType::kFloat32, 1, 1, 1, 1, 70, 8, 1, 0, true, 0};
    Call c(shape);
    c.problem.scale = 1.0f;
    c.query.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0f; });
    c.key.fill([](int64_t, int64_t, int64_t j, int64_t) { return j % 2 == 0 ? -0.0f : 0.0f; });
    for (int64_t j = 0; j < 10; ++j) c.key.set(0, 0, j, 0, NAN);
    ASSERT_TRUE(cpu::select_tokens(c.select_tokens(5), Executor{}).ok());
    EXPECT_EQ(c.threshold[0], 0.0f);
    EXPECT_EQ(c.tie_index[0], 14);                                          // keys 10..14
    ASSERT_TRUE(cpu::select_tokens(c.select_tokens(60), Executor{}).ok());  // 59 numbers only
    EXPECT_EQ(c.threshold[0], -INFINITY);
    EXPECT_EQ(c.tie_index[0], INT32_MAX);
}

TEST(CpuBlockSelect, SummariesMatchTheReference) {
    std::mt19937 random(14);
    for (int n = 0; n < 60; ++n) {
        Shape shape = random_shape(random, 300);
        Call c(shape, 700 + static_cast<uint32_t>(n));
        const Selector selector = static_cast<Selector>(n % 3);
        ASSERT_TRUE(cpu::block_summaries(c.block_summaries(selector), threaded()).ok());
        std::vector<unsigned char> fast = c.summaries;
        reference::block_summaries<float>(c.block_summaries(selector));
        ASSERT_EQ(fast, c.summaries) << describe(shape);
    }
}

// Lists may differ where two masses agree to rounding, or top_p is met to rounding.
void expect_the_reference(const Shape& shape, Call& c, Selector selector, int64_t width,
                          int64_t* different) {
    ASSERT_TRUE(cpu::block_summaries(c.block_summaries(selector), threaded()).ok());
    ASSERT_TRUE(cpu::select_blocks(c.select_blocks(selector, width), threaded()).ok());
    std::vector<int32_t> indices = c.block_indices, counts = c.block_counts;
    std::vector<float> estimate = c.estimate;
    BlockSelectParams listed = c.select_blocks(selector, width);
    listed.omitted_mass_estimate = nullptr;
    ASSERT_TRUE(cpu::select_blocks(listed, Executor{}).ok());
    ASSERT_EQ(indices, c.block_indices) << "the estimate changes the list: " << describe(shape);
    reference::select_blocks<double>(c.select_blocks(selector, width));
    if (c.top_p == 0) {
        ASSERT_EQ(counts, c.block_counts) << describe(shape);
    }
    for (int64_t list = 0; list < c.lists(); ++list) {
        auto begin = indices.begin() + list * width;
        *different += !std::equal(begin, begin + width, c.block_indices.begin() + list * width);
    }
    if (indices != c.block_indices) return;
    for (size_t row = 0; row < estimate.size(); ++row)
        ASSERT_NEAR(estimate[row], c.estimate[row], 2e-5) << describe(shape) << " row " << row;
}

// Budgets per head, a top_p and a far field, each in half of the calls.
void draw_budgets(std::mt19937& random, Call* c) {
    c->lists_for_far_field = random() % 2 == 0;
    const float shares[] = {1.0f, 0.99f, 0.7f, 0.2f};
    if (random() % 2 == 0) c->top_p = shares[random() % 4];
    if (random() % 2 == 0) return;
    for (int64_t head = 0; head < c->problem.kv_heads; ++head)
        c->head_keys.push_back(static_cast<int32_t>(random() % 500) - 50);
}

TEST(CpuBlockSelect, ListsAndEstimatesMatchTheReference) {
    std::mt19937 random(15);
    int64_t lists = 0, different = 0;
    for (int n = 0; n < 90; ++n) {
        Shape shape = random_shape(random, 700);
        Call c(shape, 900 + static_cast<uint32_t>(n));
        const int64_t width = static_cast<int64_t>(random() % 6);
        draw_budgets(random, &c);
        expect_the_reference(shape, c, static_cast<Selector>(n % 3), width, &different);
        if (::testing::Test::HasFatalFailure()) return;
        lists += c.lists();
    }
    EXPECT_GT(lists, 400);
    EXPECT_LE(different, lists / 200);
}

// More eligible blocks than a shortlist holds, so that scan and refinement both decide.
TEST(CpuBlockSelect, RefinementByKeysMatchesTheReference) {
    std::mt19937 random(17);
    int64_t lists = 0, different = 0;
    for (int n = 0; n < 48; ++n) {
        Shape shape = random_shape(random, 60);
        shape.kv_len = 1 + static_cast<int64_t>(random() % (64 * 110));
        shape.query_len = 1;
        shape.head_dim = 16;
        Call c(shape, 1300 + static_cast<uint32_t>(n));
        c.refines_by_keys = true;
        draw_budgets(random, &c);
        const int64_t widths[] = {0, 1, 7, 40};
        expect_the_reference(shape, c, Selector::kBlock, widths[n % 4], &different);
        if (::testing::Test::HasFatalFailure()) return;
        lists += c.lists();
    }
    EXPECT_GT(lists, 48);
    EXPECT_LE(different, 1);
}

// Tiles that share a scan are refined by units, a single query without keys too.
TEST(CpuBlockSelect, RefinementByUnitsMatchesTheReference) {
    std::mt19937 random(18);
    int64_t lists = 0, different = 0;
    for (DType dtype : {DType::kFloat32, DType::kFloat16})
        for (int64_t query_len : {1, 140}) {
            Shape shape{dtype, 1, 2, 2, query_len, kScanKeys + 100, 8, 100, 70, true, 0};
            if (query_len == 1) shape.causal = false;
            Call c(shape, 1400);
            // The last window weighs much, so it shows where the scan tile's walk counts it.
            for (int64_t j = kScanKeys + 64; j < shape.kv_len; ++j)
                for (int64_t d = 0; d < 8; ++d) c.key.set(0, 0, j, d, 30.0f);
            ASSERT_EQ(c.select_blocks(Selector::kBlock, 1).refinement(), Refinement::kUnits);
            draw_budgets(random, &c);
            expect_the_reference(shape, c, Selector::kBlock, 20, &different);
            if (::testing::Test::HasFatalFailure()) return;
            lists += c.lists();
        }
    EXPECT_EQ(lists, 16);
    EXPECT_EQ(different, 0);
}

// Masses of four blocks are 1/2, 1/4, 1/8 and 1/8 of the walk: what top_p needs is known.
struct KnownMasses {
    explicit KnownMasses(DType dtype) : call({dtype, 1, 2, 1, 1, 64 * 4, 8, 0, 0, true, 0}) {
        call.problem.scale = 1.0f;
        call.query.fill([](int64_t, int64_t, int64_t, int64_t d) { return d == 0 ? 1.0f : 0.0f; });
        const float doubled = std::log(2.0f);
        const float score[] = {0, 2 * doubled, doubled, 0};
        call.key.fill([&](int64_t, int64_t, int64_t j, int64_t) { return score[j / 64]; });
        call.refines_by_keys = true;
        EXPECT_TRUE(cpu::block_summaries(call.block_summaries(Selector::kBlock), Executor{}).ok());
    }
    // The list of either head; the reference agrees.
    std::vector<int32_t> lists(int64_t width) {
        EXPECT_TRUE(
            cpu::select_blocks(call.select_blocks(Selector::kBlock, width), Executor{}).ok());
        const std::vector<int32_t> found = call.block_indices;
        reference::select_blocks<double>(call.select_blocks(Selector::kBlock, width));
        EXPECT_EQ(found, call.block_indices);
        return found;
    }
    Call call;
};

TEST(CpuBlockSelect, TopPDropsTheLightestBlocksThatItCan) {
    for (DType dtype : {DType::kFloat32, DType::kFloat16}) {
        KnownMasses masses(dtype);
        auto first_list = [&](float top_p, int64_t width) {
            masses.call.top_p = top_p;
            std::vector<int32_t> list = masses.lists(width);
            list.resize(static_cast<size_t>(width));
            return list;
        };
        using List = std::vector<int32_t>;
        EXPECT_EQ(first_list(0.0f, 3), (List{0, 1, 2}));
        EXPECT_EQ(first_list(1.0f, 3), (List{0, 1, 2}));
        EXPECT_EQ(first_list(0.9f, 3), (List{0, 1, 2})) << "block 0 holds 1/8";
        EXPECT_EQ(first_list(0.8f, 3), (List{1, 2, -1}));
        EXPECT_EQ(first_list(0.6f, 3), (List{1, -1, -1})) << "blocks 0 and 2 hold 3/8";
        EXPECT_EQ(first_list(0.1f, 3), (List{-1, -1, -1})) << "all three hold 7/8";
        EXPECT_EQ(first_list(0.1f, 4), (List{0, 1, 2, 3})) << "all eligible blocks fit";
    }
}

TEST(CpuBlockSelect, TopPDropsTheHigherOfEqualBlocks) {
    Call c({DType::kFloat16, 1, 1, 1, 1, 64 * 5, 8, 0, 0, true, 0});
    c.key.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0f; });
    c.refines_by_keys = true;
    c.top_p = 0.5f;  // every block holds 1/5
    ASSERT_TRUE(cpu::block_summaries(c.block_summaries(Selector::kBlock), Executor{}).ok());
    ASSERT_TRUE(cpu::select_blocks(c.select_blocks(Selector::kBlock, 4), Executor{}).ok());
    EXPECT_EQ(c.block_indices, (std::vector<int32_t>{0, 1, -1, -1}));
    reference::select_blocks<double>(c.select_blocks(Selector::kBlock, 4));
    EXPECT_EQ(c.block_indices, (std::vector<int32_t>{0, 1, -1, -1}));
}

TEST(CpuBlockSelect, EveryHeadHasABudgetOfItsOwn) {
    for (DType dtype : {DType::kFloat32, DType::kFloat16}) {
        KnownMasses masses(dtype);
        const int32_t none = 63, one = 127, all = 1000;
        masses.call.head_keys = {none, all};
        EXPECT_EQ(masses.lists(3), (std::vector<int32_t>{-1, -1, -1, 0, 1, 2}));
        EXPECT_EQ(masses.call.block_counts, (std::vector<int32_t>{0, 3}));
        EXPECT_FLOAT_EQ(masses.call.estimate[0], 1.0f);
        EXPECT_NEAR(masses.call.estimate[1], 0.125f, 1e-3f);
        masses.call.head_keys = {all, one};
        EXPECT_EQ(masses.lists(4), (std::vector<int32_t>{0, 1, 2, 3, 1, -1, -1, -1}));
        EXPECT_EQ(masses.call.estimate[0], 0.0f);
        EXPECT_NEAR(masses.call.estimate[1], 0.5f, 1e-3f);
    }
}

// Two blocks whose units have the same means: the keys tell them apart.
TEST(CpuBlockSelect, KeysTellBlocksOfEqualMeansApart) {
    for (DType dtype : {DType::kFloat32, DType::kFloat16}) {
        Call c({dtype, 1, 1, 1, 1, 64 * 4, 8, 0, 0, true, 0});
        c.query.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0f; });
        c.key.fill([](int64_t, int64_t, int64_t j, int64_t) {
            return j < 128 ? 0.0f : j % 2 == 0 ? 2.0f : -2.0f;
        });
        ASSERT_TRUE(cpu::block_summaries(c.block_summaries(Selector::kBlock), Executor{}).ok());
        for (bool keys : {false, true}) {
            c.refines_by_keys = keys;
            ASSERT_TRUE(cpu::select_blocks(c.select_blocks(Selector::kBlock, 2), Executor{}).ok());
            EXPECT_EQ(c.block_indices,
                      keys ? (std::vector<int32_t>{2, 3}) : (std::vector<int32_t>{0, 1}));
        }
    }
}

// A block with window keys is attended to, hence never omitted.
TEST(CpuBlockSelect, TheEstimateCountsBlocksThatAreNotWalked) {
    for (Selector selector : {Selector::kBlock, Selector::kQuest, Selector::kMean})
        for (bool keys : {false, true}) {
            Call c({DType::kFloat32, 1, 1, 1, 1, 64 * 8, 8, 96, 1, true, 0});
            c.key.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0f; });
            c.refines_by_keys = keys;
            ASSERT_TRUE(cpu::block_summaries(c.block_summaries(selector), Executor{}).ok());
            ASSERT_TRUE(cpu::select_blocks(c.select_blocks(selector, 2), Executor{}).ok());
            EXPECT_EQ(c.block_indices, (std::vector<int32_t>{0, 1}));
            EXPECT_FLOAT_EQ(c.estimate[0], 0.5f) << "blocks 2 to 5, as 6 and 7 hold the window";
        }
}

TEST(CpuBlockSelect, TiesGoToTheLowerBlock) {
    for (int64_t blocks : {20, 100}) {
        Shape shape{DType::kFloat16, 1, 1, 4, 32, 64 * blocks, 16, 64, 64, true, 0};
        for (Selector selector : {Selector::kBlock, Selector::kQuest, Selector::kMean}) {
            Call c(shape);
            c.key.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0f; });
            ASSERT_TRUE(cpu::block_summaries(c.block_summaries(selector), Executor{}).ok());
            ASSERT_TRUE(cpu::select_blocks(c.select_blocks(selector, 3), Executor{}).ok());
            EXPECT_EQ(c.block_indices, (std::vector<int32_t>{1, 2, 3}));
            EXPECT_EQ(c.block_counts, (std::vector<int32_t>{3}));
        }
    }
}

TEST(CpuBlockSelect, AQueryThatSeesANanHasNoMasses) {
    Shape shape{DType::kFloat32, 1, 1, 1, 1, 64 * 6, 8, 1, 0, true, 0};
    for (Selector selector : {Selector::kBlock, Selector::kQuest, Selector::kMean})
        for (const auto& [bad, keys] :
             {std::pair{NAN, false}, {NAN, true}, {INFINITY, false}, {INFINITY, true}}) {
            Call c(shape);
            c.refines_by_keys = keys;
            c.query.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0f; });
            c.key.set(0, 0, 64 * 4 + 2, 1, bad);
            ASSERT_TRUE(cpu::block_summaries(c.block_summaries(selector), Executor{}).ok());
            ASSERT_TRUE(cpu::select_blocks(c.select_blocks(selector, 3), Executor{}).ok());
            EXPECT_EQ(c.block_indices, (std::vector<int32_t>{0, 1, 2}))
                << static_cast<int>(selector) << bad;
            EXPECT_EQ(c.estimate[0], 0.0f);
        }
}

TEST(CpuOmittedMass, MatchesTheReference) {
    std::mt19937 random(16);
    for (int n = 0; n < 40; ++n) {
        Shape shape = random_shape(random, 300);
        Call c(shape, 1100 + static_cast<uint32_t>(n));
        uint32_t errors = 0;
        ASSERT_TRUE(cpu::attention(c.attention(), threaded(), &errors).ok());
        if (n % 2 == 1)
            for (int k = 0; k < 5; ++k)
                c.sampled.push_back(
                    static_cast<int64_t>(random() % static_cast<uint64_t>(shape.query_len)));
        ASSERT_TRUE(cpu::omitted_mass(c.omitted_mass(), threaded(), &errors).ok());
        std::vector<float> fast = c.omitted;
        reference::omitted_mass<double>(c.omitted_mass(), &errors);
        ASSERT_EQ(errors, 0u);
        for (size_t row = 0; row < fast.size(); ++row)
            ASSERT_NEAR(fast[row], c.omitted[row], 2e-5) << describe(shape) << " row " << row;
    }
}

TEST(CpuOmittedMass, RowsOutOfRangeAreReported) {
    Shape shape{DType::kFloat32, 1, 1, 2, 10, 30, 8, 4, 1, true, 0};
    Call c(shape);
    uint32_t errors = 0;
    ASSERT_TRUE(cpu::attention(c.attention(), Executor{}, &errors).ok());
    c.sampled = {3, -1, 10, INT64_MAX, INT64_MIN, 9};
    ASSERT_TRUE(cpu::omitted_mass(c.omitted_mass(), Executor{}, &errors).ok());
    EXPECT_EQ(errors, kErrorRowIndex);
    for (size_t n = 0; n < c.omitted.size(); ++n)
        EXPECT_EQ(std::isnan(c.omitted[n]), n % 6 != 0 && n % 6 != 5) << n;
}

}  // namespace
}  // namespace condensate::testing
