// Every message names the argument, its value, what is allowed and the fix.
#include "host/validate.h"

#include <cmath>
#include <string>

#include <gtest/gtest.h>

#include "call.h"

namespace condensate::testing {
namespace {

Call valid_call() { return Call({DType::kFloat16, 1, 2, 4, 10, 100, 64, 8, 4, true, 0}); }

template <class Params>
std::string message_of(const Params& params) {
    Status status = validate(params);
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    return status.message;
}

// The message for an attention call whose problem was changed.
template <class Change>
std::string message_after(const Change& change) {
    Call call = valid_call();
    AttentionParams params = call.attention();
    change(params);
    return message_of(params);
}

TEST(Validate, GoodCallsPass) {
    Call call = valid_call();
    EXPECT_TRUE(validate(call.attention()).ok());
    EXPECT_TRUE(validate(call.select_tokens(5)).ok());
    EXPECT_TRUE(validate(call.block_summaries(Selector::kQuest)).ok());
    EXPECT_TRUE(validate(call.select_blocks(Selector::kQuest, 3)).ok());
    EXPECT_TRUE(validate(call.omitted_mass()).ok());
    EXPECT_TRUE(validate(MergeStatesParams{DType::kFloat32, 0, 8}).ok());
}

TEST(Validate, FarField) {
    Call call = valid_call();
    const FarPoolsParams pools = call.far_pools();
    EXPECT_TRUE(validate(pools).ok());
    EXPECT_TRUE(validate(call.attention()).ok());
    auto pools_after = [&](auto change) {
        FarPoolsParams params = pools;
        change(params);
        return message_of(params);
    };
    EXPECT_EQ(pools_after([](auto& p) { p.value.stride_block = 63; }),
              "far_pools: value.stride_block is 63, expected at least head_dim (64), as rows of "
              "means do not overlap; pass the elements from one block's row to the next.");
    EXPECT_EQ(pools_after([](auto& p) { p.key.data = nullptr; }),
              "far_pools: key is null, expected a pointer to 256 elements; allocate it.");
    EXPECT_EQ(pools_after([](auto& p) { p.sums = nullptr; }),
              "far_pools: sums is null, expected a pointer to 512 elements; allocate it.");
    EXPECT_EQ(pools_after([](auto& p) { p.kv_heads = -1; }),
              "far_pools: kv_heads is -1, expected 0 <= kv_heads < 2^31; split the call.");

    auto attention_after = [&](auto change) {
        AttentionParams params = call.attention();
        change(params);
        return message_of(params);
    };
    EXPECT_EQ(attention_after([](auto& p) { p.far_field.value = {}; }),
              "attention: far_field.value.stride_block is 0, expected at least head_dim (64), as "
              "rows of means do not overlap; pass the elements from one block's row to the next.");
    EXPECT_EQ(attention_after([](auto& p) { p.far_field.means = nullptr; }),
              "attention: far_field.means is null, expected a pointer to 512 elements; allocate "
              "it.");
    float number = 0;
    int32_t index = 0;
    EXPECT_EQ(attention_after([&](auto& p) {
                  p.threshold = &number;
                  p.tie_index = &index;
              }),
              "attention: both far_field and threshold are given, expected at most one, as the far "
              "field condenses blocks and thresholds select keys; leave far_field empty.");
    AttentionParams without = call.attention();
    without.far_field.key.data = nullptr;
    without.far_field.sums = nullptr;
    EXPECT_TRUE(validate(without).ok()) << "without key means there is no far field to check";
    without.omitted_mass_estimate = &number;
    EXPECT_EQ(message_of(without),
              "attention: omitted_mass_estimate is given without far_field, expected both, as the "
              "estimate is made of the far field's pools; fill in far_field, or have the selection "
              "estimate.");
}

TEST(Validate, EmptyTensorsMayBeNull) {
    AttentionParams params;
    params.problem.query_heads = params.problem.kv_heads = 1;
    params.problem.head_dim = 8;
    params.problem.query_len = 3;
    EXPECT_TRUE(validate(params).ok()) << "batch 0";
    params.problem.batch = 1;
    EXPECT_FALSE(validate(params).ok()) << "null query";
    params.problem.query_len = 0;
    params.problem.kv_len = 3;
    EXPECT_TRUE(validate(params).ok()) << "no query, so the keys are never read";
}

TEST(Validate, Sizes) {
    EXPECT_EQ(message_after([](auto& p) { p.problem.batch = -1; }),
              "attention: batch is -1, expected 0 <= batch < 2^31; split the call.");
    EXPECT_EQ(message_after([](auto& p) { p.problem.kv_len = int64_t{1} << 31; }),
              "attention: kv_len is 2147483648, expected 0 <= kv_len < 2^31; split the call.");
    EXPECT_EQ(message_after([](auto& p) { p.problem.query_len = -5; }),
              "attention: query_len is -5, expected 0 <= query_len < 2^31; split the call.");
    EXPECT_EQ(message_after([](auto& p) { p.problem.dtype = static_cast<DType>(7); }),
              "attention: dtype code is 7, expected float16 (0), bfloat16 (1) or float32 (2); "
              "convert the tensors first.");
}

TEST(Validate, Heads) {
    EXPECT_EQ(message_after([](auto& p) { p.problem.query_heads = 7; }),
              "attention: query has 7 heads and key has 2, expected a multiple of the latter, 1 to "
              "64 times as many, fewer than 2^31; check that the tensors are [batch, heads, seq, "
              "head_dim].");
    const auto names = [](int64_t query_heads, int64_t kv_heads) {
        const std::string message = message_after([&](auto& p) {
            p.problem.query_heads = query_heads;
            p.problem.kv_heads = kv_heads;
        });
        return message.find("query has " + std::to_string(query_heads) + " heads and key has " +
                            std::to_string(kv_heads)) != std::string::npos;
    };
    EXPECT_TRUE(names(4, 0));
    EXPECT_TRUE(names(0, 4));
    EXPECT_TRUE(names(130, 2)) << "65 to a KV head";
    EXPECT_TRUE(names(int64_t{1} << 31, int64_t{1} << 30)) << "heads fit int32";
    EXPECT_TRUE(names(INT64_MAX - 1, INT64_MAX / 2));
}

// Products of sizes that each are valid must not wrap to 0, where a pointer may be null.
TEST(Validate, ProductsOfSizesDoNotOverflow) {
    constexpr int64_t kHuge = int64_t{1} << 30;
    const auto huge = [](auto& p) {
        p = {};
        p.problem.batch = p.problem.query_len = p.problem.kv_len = kHuge;
        p.problem.query_heads = p.problem.kv_heads = 16;
        p.problem.head_dim = 64;
    };
    EXPECT_EQ(
        message_after(huge),
        "attention: query has 2^58 elements or more, expected fewer; split the call by batch, "
        "heads or queries.");
    TokenSelectParams tokens;
    huge(tokens);
    EXPECT_NE(message_of(tokens).find("query has 2^58"), std::string::npos);
    OmittedMassParams omitted;
    huge(omitted);
    omitted.num_rows = kHuge;
    EXPECT_NE(message_of(omitted).find("query has 2^58"), std::string::npos);
    BlockSelectParams blocks;
    huge(blocks);
    EXPECT_NE(message_of(blocks).find("query has 2^58"), std::string::npos);
    BlockSummaryParams summaries{DType::kFloat32, kHuge, kHuge, kHuge, 64, Selector::kBlock, {}};
    EXPECT_NE(message_of(summaries).find("key has 2^58"), std::string::npos);
    FarPoolsParams pools{DType::kFloat32, kHuge, kHuge, kHuge, 64, {}, {}};
    pools.key.stride_block = pools.value.stride_block = 64;
    EXPECT_NE(message_of(pools).find("key has 2^58"), std::string::npos);
    for (int64_t rows : {INT64_MAX, INT64_MAX / 64 + 1, int64_t{1} << 55})
        EXPECT_NE(message_of(MergeStatesParams{DType::kFloat32, rows, 64}).find("out_a has 2^58"),
                  std::string::npos)
            << rows;
    // A wide list over many tiles.
    Call call = valid_call();
    AttentionParams lists = call.attention();
    lists.problem.batch = kHuge;
    lists.max_blocks = kHuge;
    lists.far_field = {};
    EXPECT_NE(message_of(lists).find("block_indices has 2^58"), std::string::npos);
}

TEST(Validate, HeadDim) {
    EXPECT_EQ(message_after([](auto& p) { p.problem.head_dim = 100; }),
              "attention: head_dim is 100, expected a multiple of 8 from 8 to 256; pad the last "
              "dimension with zeros to 104 and keep the scale of the unpadded size.");
    EXPECT_EQ(message_after([](auto& p) { p.problem.head_dim = 264; }),
              "attention: head_dim is 264, expected a multiple of 8 from 8 to 256; use heads of at "
              "most 256 elements.");
    EXPECT_NE(message_after([](auto& p) { p.problem.head_dim = 0; }).find("head_dim is 0"),
              std::string::npos);
}

TEST(Validate, RangesAndScale) {
    EXPECT_EQ(message_after([](auto& p) { p.problem.window = -1; }),
              "attention: window is -1, expected 0 <= window < 2^31; pass 0 for none.");
    EXPECT_EQ(message_after([](auto& p) { p.problem.anchors = -3; }),
              "attention: anchors is -3, expected 0 <= anchors < 2^31; pass 0 for none.");
    EXPECT_EQ(message_after([](auto& p) { p.problem.scale = INFINITY; }),
              "attention: scale is inf, expected a finite number; pass None for 1/sqrt(head_dim).");
    Call call = valid_call();
    call.problem.scale = -1.0f;
    EXPECT_TRUE(validate(call.attention()).ok());
    EXPECT_EQ(message_of(call.select_blocks(Selector::kMean, 1)),
              "select_blocks: scale is -1, expected scale > 0 because blocks are ranked by "
              "exp(scale * score); negate the query instead.");
}

TEST(Validate, OrderIsFixed) {
    // Of several faults the first in the order of checks is named.
    EXPECT_NE(message_after([](auto& p) {
                  p.query.data = nullptr;
                  p.problem.window = -1;
                  p.problem.head_dim = 3;
              }).find("head_dim"),
              std::string::npos);
}

TEST(Validate, Budget) {
    EXPECT_TRUE(validate_topk("attention", 1728, Selector::kBlock).ok());
    EXPECT_TRUE(validate_topk("attention", 1000, Selector::kExact).ok());
    EXPECT_STREQ(
        validate_topk("attention", 1000, Selector::kQuest).message,
        "attention: topk is 1000, expected a multiple of 64 for the block selectors; pass 960 or "
        "1024, or selector=\"exact\", which takes any number of keys.");
    EXPECT_STREQ(validate_topk("attention", -64, Selector::kBlock).message,
                 "attention: topk is -64, expected 0 <= topk < 2^31; pass 0 to select nothing.");
}

TEST(Validate, StageArguments) {
    Call call = valid_call();
    EXPECT_EQ(message_of(call.block_summaries(Selector::kExact)),
              "block_summaries: selector is \"exact\", expected \"block\", \"quest\" or \"mean\"; "
              "\"exact\" selects single keys: pass selector=\"exact\" to attention.");
    call.block_summaries(Selector::kBlock);
    BlockSelectParams select = call.select_blocks(Selector::kBlock, 2);
    select.max_blocks = -1;
    EXPECT_EQ(message_of(select),
              "select_blocks: max_blocks is -1, expected 0 <= max_blocks < 2^31; pass topk / 64.");
    select = call.select_blocks(Selector::kBlock, 2);
    select.top_p = 1.5f;
    EXPECT_EQ(message_of(select),
              "select_blocks: top_p is 1.5, expected 0 < top_p <= 1, the share of the softmax mass "
              "that lists must hold; pass 0 for lists of topk keys.");
    for (float top_p : {-0.1f, NAN, INFINITY}) {
        select.top_p = top_p;
        EXPECT_NE(message_of(select).find("top_p is"), std::string::npos) << top_p;
    }
    for (float top_p : {0.0f, 1e-6f, 0.9f, 1.0f}) {
        select.top_p = top_p;
        EXPECT_TRUE(validate(select).ok()) << top_p;
    }
    OmittedMassParams omitted = call.omitted_mass();
    omitted.num_rows = 4;
    EXPECT_EQ(message_of(omitted),
              "omitted_mass: num_rows is 4 without rows, expected query_len (10); pass the query "
              "indices to audit as rows.");
    EXPECT_EQ(message_of(MergeStatesParams{DType::kFloat32, -2, 8}),
              "merge_states: rows is -2, expected rows >= 0; pass batch * heads * query_len.");
}

TEST(Validate, PairsAndPointers) {
    int32_t list[4] = {};
    float number = 0;
    EXPECT_EQ(message_after([&](auto& p) {
                  p.max_blocks = 1;
                  p.block_indices = list;
              }),
              "attention: only one of block_indices and block_counts is given, expected both or "
              "neither; pass both results of the selection.");
    EXPECT_NE(message_after([&](auto& p) { p.threshold = &number; }).find("tie_index"),
              std::string::npos);
    EXPECT_EQ(message_after([&](auto& p) {
                  p.max_blocks = 1;
                  p.block_indices = p.block_counts = p.tie_index = list;
                  p.threshold = &number;
              }),
              "attention: both block_indices and threshold are given, expected at most one "
              "selection; drop one of them.");
    EXPECT_EQ(message_after([](auto& p) { p.value.data = nullptr; }),
              "attention: value is null, expected a pointer to 12800 elements; allocate it.");
    EXPECT_NE(message_after([](auto& p) { p.max_blocks = 3; }).find("block_indices is null"),
              std::string::npos);
}

}  // namespace
}  // namespace condensate::testing
