// Plans are pure functions of the call, the device and the environment: every rule is tested
// without a device.
#include <string>

#include <gtest/gtest.h>

#include "host/call.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"

namespace condensate {
namespace {

DeviceFacts hopper() { return {true, 0, 9, 0, 132, 227 * 1024, false}; }
DeviceFacts hopper_with_its_kernels() { return {true, 0, 9, 0, 132, 227 * 1024, true}; }
DeviceFacts turing() { return {true, 1, 7, 5, 68, 64 * 1024, false}; }
Environment forcing(Path path) { return {true, path, false}; }

Problem problem_of(DType dtype) {
    Problem p;
    p.dtype = dtype;
    p.batch = 2;
    p.query_heads = 8;
    p.kv_heads = 2;
    p.query_len = 1000;
    p.kv_len = 8192;
    p.head_dim = 128;
    p.window = 256;
    p.anchors = 64;
    return p;
}

// Parameters of a stage without memory, on contiguous tensors.
template <class Params>
Params params_of(DType dtype) {
    Params params;
    params.problem = problem_of(dtype);
    const Problem& p = params.problem;
    params.query = {nullptr, p.query_heads * p.query_len * p.head_dim, p.query_len * p.head_dim,
                    p.head_dim};
    params.key = {nullptr, p.kv_heads * p.kv_len * p.head_dim, p.kv_len * p.head_dim, p.head_dim};
    return params;
}
AttentionParams attention_of(DType dtype) {
    auto params = params_of<AttentionParams>(dtype);
    params.value = params.key;
    return params;
}
AttentionCall call_of(DType dtype) {
    auto call = params_of<AttentionCall>(dtype);
    call.value = call.key;
    call.topk = 1728;
    return call;
}

const void* misaligned() { return reinterpret_cast<const void*>(std::uintptr_t{8}); }

template <class Params>
StagePlan plan_of(const Params& params, const DeviceFacts& facts,
                  const Environment& environment = {}) {
    Plan plan;
    Status status = plan_alone(params, facts, environment, &plan);
    EXPECT_TRUE(status.ok()) << status.message;
    return plan.stages[0];
}

template <class Params>
std::string refusal(const Params& params, const DeviceFacts& facts, Path forced) {
    Plan plan;
    Status status = plan_alone(params, facts, forcing(forced), &plan);
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    return status.message;
}

Plan plan_of_call(const AttentionCall& call, const DeviceFacts& facts = {}) {
    Plan plan;
    Status status = make_plan(call, facts, {}, &plan);
    EXPECT_TRUE(status.ok()) << status.message;
    return plan;
}

TEST(Plan, CpuTensorsRunOnTheCpu) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
        StagePlan plan = plan_of(attention_of(dtype), DeviceFacts{});
        EXPECT_EQ(plan.path, Path::kCpu);
        EXPECT_STREQ(plan.reason, "tensors are on the CPU");
    }
}

TEST(Plan, HopperKernelsWhereTheyFit) {
    using P = AttentionParams;
    const DeviceFacts facts = hopper_with_its_kernels();
    const P fits = attention_of(DType::kBFloat16);
    EXPECT_EQ(plan_of(fits, facts).path, Path::kSm90);
    EXPECT_EQ(plan_of(fits, hopper()).path, Path::kSm80);
    DeviceFacts blackwell = facts;
    blackwell.sm_major = 10;
    EXPECT_EQ(plan_of(fits, blackwell).path, Path::kSm80);

    struct {
        void (*change)(P&);
        const char* reason;
    } const misfits[] = {
        {[](P& p) { p.problem.head_dim = 96; }, "head_dim is neither 64 nor 128"},
        {[](P& p) { p.problem.query_heads = 34; }, "more than 16 query heads per KV head"},
        {[](P& p) { p.problem.query_len = 31; }, "fewer queries than a tile"},
        {[](P& p) { p.problem.kv_len = 0; }, "no keys"},
        {[](P& p) { p.key.stride_head = 0; }, "a stride that TMA cannot take"},
        {[](P& p) { p.threshold = reinterpret_cast<const float*>(&p); },
         "half precision, aligned, sm >= 8.0"},
    };
    for (const auto& misfit : misfits) {
        P params = fits;
        misfit.change(params);
        StagePlan plan = plan_of(params, facts);
        EXPECT_EQ(plan.path, Path::kSm80) << misfit.reason;
        EXPECT_STREQ(plan.reason, misfit.reason);
    }
}

TEST(Plan, HopperSelectionWhereItFits) {
    const DeviceFacts facts = hopper_with_its_kernels();
    const auto fits = params_of<BlockSelectParams>(DType::kFloat16);
    EXPECT_EQ(plan_of(fits, facts).path, Path::kSm90);
    BlockSelectParams params = fits;
    params.problem.head_dim = 40;  // padded
    EXPECT_EQ(plan_of(params, facts).path, Path::kSm90);
    params.problem.head_dim = 136;
    EXPECT_STREQ(plan_of(params, facts).reason, "summaries of more than 128 elements");
    params = fits;
    params.problem.kv_len = 0;
    EXPECT_STREQ(plan_of(params, facts).reason, "no keys");
    params = fits;
    params.selector = Selector::kMean;
    EXPECT_EQ(plan_of(params, facts).path, Path::kSm80);
}

TEST(Plan, ForcedSm90RunsSm80InStagesWithoutAKernelOfTheirOwn) {
    const DeviceFacts facts = hopper_with_its_kernels();
    const Environment sm90 = forcing(Path::kSm90);
    EXPECT_EQ(plan_of(attention_of(DType::kFloat16), facts, sm90).path, Path::kSm90);
    EXPECT_EQ(plan_of(params_of<OmittedMassParams>(DType::kFloat16), facts, sm90).path,
              Path::kSm80);
    auto mean = params_of<BlockSelectParams>(DType::kFloat16);
    mean.selector = Selector::kMean;
    EXPECT_EQ(plan_of(mean, facts, sm90).path, Path::kSm80);
    auto narrow = attention_of(DType::kFloat16);
    narrow.problem.head_dim = 80;
    EXPECT_NE(refusal(narrow, facts, Path::kSm90).find("head_dim is neither"), std::string::npos);
}

template <class Params>
void expect_mma_where_it_can() {
    Params params = params_of<Params>(DType::kBFloat16);
    EXPECT_EQ(plan_of(params, hopper()).path, Path::kSm80);
    EXPECT_EQ(plan_of(params, turing()).path, Path::kSimt);
    EXPECT_STREQ(plan_of(params, turing()).reason, "compute capability below 8.0");
    params.query.data = misaligned();
    EXPECT_EQ(plan_of(params, hopper()).path, Path::kSimt);
    EXPECT_STREQ(plan_of(params, hopper()).reason,
                 "a pointer or stride is not a multiple of 16 bytes");
    params = params_of<Params>(DType::kFloat32);
    EXPECT_EQ(plan_of(params, hopper()).path, Path::kSimt);
    EXPECT_STREQ(plan_of(params, hopper()).reason, "float32 has no mma path");
}

TEST(Plan, HalfPrecisionUsesMmaWhereItCan) {
    expect_mma_where_it_can<AttentionParams>();
    expect_mma_where_it_can<BlockSelectParams>();
    expect_mma_where_it_can<TokenSelectParams>();
    expect_mma_where_it_can<OmittedMassParams>();
}

template <class Params>
void expect_one_kernel() {
    EXPECT_EQ(plan_of(Params{}, hopper()).path, Path::kSimt);
    EXPECT_STREQ(plan_of(Params{}, hopper()).reason, "the stage's one CUDA kernel");
    for (Path forced : {Path::kSm90, Path::kSm80, Path::kSimt})
        EXPECT_EQ(plan_of(Params{}, hopper(), forcing(forced)).path, Path::kSimt);
}

TEST(Plan, StagesWithOneCudaKernelIgnoreTheChoice) {
    expect_one_kernel<BlockSummaryParams>();
    expect_one_kernel<FarPoolsParams>();
    expect_one_kernel<MergeStatesParams>();
    expect_one_kernel<OmittedFromLseParams>();
}

TEST(Plan, ForcedPathsRunOrSayWhyNot) {
    auto params = attention_of(DType::kFloat16);
    EXPECT_EQ(plan_of(params, hopper(), forcing(Path::kSimt)).path, Path::kSimt);
    EXPECT_EQ(plan_of(params, hopper(), forcing(Path::kSm80)).path, Path::kSm80);
    EXPECT_EQ(plan_of(params, {}, forcing(Path::kCpuReference)).path, Path::kCpuReference);
    EXPECT_STREQ(plan_of(params, {}, forcing(Path::kCpu)).reason,
                 "forced by CONDENSATE_FORCE_PATH");

    EXPECT_EQ(refusal(params, {}, Path::kSm80),
              "attention: CONDENSATE_FORCE_PATH is sm80, which cannot run this call: the tensors "
              "are on the CPU; unset it, or force cpu or cpu_reference.");
    EXPECT_EQ(refusal(params, hopper(), Path::kCpu),
              "attention: CONDENSATE_FORCE_PATH is cpu, which cannot run this call: the tensors "
              "are on a CUDA device; unset it, or force simt.");
    params.problem.dtype = DType::kFloat32;
    EXPECT_EQ(refusal(params, hopper(), Path::kSm80),
              "attention: CONDENSATE_FORCE_PATH is sm80, which cannot run this call: float32 has "
              "no mma path; unset it, or force simt.");
    EXPECT_NE(refusal(params, turing(), Path::kSm80).find("compute capability below 8.0"),
              std::string::npos);
}

TEST(Plan, SelectionFollowsTheBudget) {
    AttentionCall call = call_of(DType::kFloat32);
    Plan plan = plan_of_call(call);
    EXPECT_EQ(plan.selection, Selection::kBlocks);
    EXPECT_EQ(plan.list_width, 27);
    EXPECT_EQ(plan.summary_rows, 128 * 9);
    EXPECT_EQ(plan.tile_positions, 32);
    EXPECT_EQ(plan.tiles, 2 * 2 * 32);
    EXPECT_EQ(plan.keys_per_query, 2048);

    call.selector = Selector::kExact;
    EXPECT_EQ(plan_of_call(call).selection, Selection::kTokens);
    EXPECT_EQ(plan_of_call(call).list_width, 0);
    EXPECT_EQ(plan_of_call(call).keys_per_query, 2048);
    call.problem.kv_len = 2048;  // 2048 = 64 + 256 + 1728: nothing is left out
    EXPECT_EQ(plan_of_call(call).selection, Selection::kCovered);
    EXPECT_EQ(plan_of_call(call).keys_per_query, 2048);
    EXPECT_EQ(plan_of_call(call).num_stages, 1);
    call.problem.kv_len = 2049;
    EXPECT_EQ(plan_of_call(call).selection, Selection::kTokens);
    call.given_lists = true;
    call.max_blocks = 5;
    EXPECT_EQ(plan_of_call(call).selection, Selection::kGiven);
    EXPECT_EQ(plan_of_call(call).keys_per_query, 64 + 256 + 320);
}

// Budgets of the heads may be smaller than the call's, so nothing can be concluded from that.
TEST(Plan, BudgetsOfHeadsAlwaysSelect) {
    const int32_t budgets[] = {64, 64};
    AttentionCall call = call_of(DType::kFloat32);
    call.problem.kv_len = 1500;
    EXPECT_EQ(plan_of_call(call).selection, Selection::kCovered);
    call.head_keys = budgets;
    EXPECT_EQ(plan_of_call(call).selection, Selection::kBlocks);
}

// The stage by itself selects nothing: its last row attends its window and the anchors alone.
TEST(Plan, AStageWithoutListsAttendsItsRanges) {
    auto params = attention_of(DType::kFloat32);
    params.problem.query_len = params.problem.kv_len = 2048;
    params.problem.window = 800;
    Plan plan;
    ASSERT_TRUE(plan_alone(params, {}, {}, &plan).ok());
    EXPECT_EQ(plan.selection, Selection::kNone);
    EXPECT_EQ(plan.keys_per_query, 864);
    AttentionCall call = call_of(DType::kFloat32);
    call.problem = params.problem;
    call.given_lists = true;  // of width 0
    EXPECT_EQ(plan_of_call(call).selection, Selection::kGiven);
    EXPECT_EQ(plan_of_call(call).keys_per_query, 864);
}

TEST(Plan, AttendsToEverythingWhereThatIsFaster) {
    AttentionCall call = call_of(DType::kBFloat16);
    auto selection_at = [&](int64_t query_len, int64_t kv_len) {
        call.problem.query_len = query_len;
        call.problem.kv_len = kv_len;
        return plan_of_call(call).selection;
    };
    // 2048 keys a row; an average row of a causal prefill sees half of them.
    EXPECT_EQ(selection_at(5120, 5120), Selection::kDense);
    EXPECT_EQ(plan_of_call(call).keys_per_query, 5120);
    EXPECT_EQ(plan_of_call(call).far_pools, 0);
    EXPECT_EQ(selection_at(5121, 5121), Selection::kBlocks);
    EXPECT_EQ(selection_at(1, 2560), Selection::kDense);
    EXPECT_EQ(selection_at(1, 2561), Selection::kBlocks);
    call.topk = 128;
    EXPECT_EQ(selection_at(1024, 1024), Selection::kDense);
    EXPECT_EQ(selection_at(1023, 1023), Selection::kBlocks);
    call.problem.causal = false;  // 704 keys, and every row sees all
    EXPECT_EQ(selection_at(1024, 1024), Selection::kBlocks);
    call.problem.causal = true;
    call.selector = Selector::kExact;
    EXPECT_EQ(selection_at(1024, 1024), Selection::kTokens);
}

TEST(Plan, FarFieldAttendsWholeBlocksAndCondensesTheRest) {
    AttentionCall call = call_of(DType::kFloat32);
    call.far_field = true;
    EXPECT_EQ(plan_of_call(call).far_pools, 128);
    // 32 positions with windows of 256 touch at most 6 blocks.
    EXPECT_EQ(plan_of_call(call).keys_per_query, 64 + 6 * 64 + 1728);
    call.problem.kv_len = 8193;
    EXPECT_EQ(plan_of_call(call).far_pools, 65);
    call.problem.window = 0;
    call.problem.anchors = 65;
    EXPECT_EQ(plan_of_call(call).keys_per_query, 128 + 1728);
    call.problem.kv_len = 1000;
    EXPECT_EQ(plan_of_call(call).selection, Selection::kCovered);
    EXPECT_EQ(plan_of_call(call).far_pools, 0);
    EXPECT_EQ(plan_of_call(call).keys_per_query, 1000);
}

std::string stages_of(const Plan& plan) {
    std::string names;
    for (int i = 0; i < plan.num_stages; ++i)
        names += std::string(i > 0 ? " " : "") + stage_name(plan.stages[i].stage);
    return names;
}

TEST(Plan, ListsTheStagesOfTheCall) {
    AttentionCall call = call_of(DType::kBFloat16);
    EXPECT_EQ(stages_of(plan_of_call(call)), "block_summaries select_blocks attention");
    call.far_field = true;
    EXPECT_EQ(stages_of(plan_of_call(call)),
              "block_summaries select_blocks block_summaries far_pools attention");
    call.selector = Selector::kQuest;  // whose summaries hold no means
    EXPECT_EQ(stages_of(plan_of_call(call)),
              "block_summaries select_blocks block_summaries block_summaries far_pools attention");
    call.far_field = false;
    call.selector = Selector::kExact;
    EXPECT_EQ(stages_of(plan_of_call(call)), "select_tokens attention");
    float estimate = 0;
    call.omitted_mass_estimate = &estimate;
    EXPECT_EQ(stages_of(plan_of_call(call)), "select_tokens attention omitted_from_lse");
}

TEST(Plan, EachStageHasItsPath) {
    const DeviceFacts facts = hopper_with_its_kernels();
    AttentionCall call = call_of(DType::kBFloat16);
    const Path by_block[] = {Path::kSimt, Path::kSm90, Path::kSm90};
    const Path by_mean[] = {Path::kSimt, Path::kSm80, Path::kSm90};
    for (Selector selector : {Selector::kBlock, Selector::kMean}) {
        call.selector = selector;
        const Plan plan = plan_of_call(call, facts);
        ASSERT_EQ(plan.num_stages, 3);
        for (int i = 0; i < 3; ++i)
            EXPECT_EQ(plan.stages[i].path, (selector == Selector::kBlock ? by_block : by_mean)[i]);
    }
    call.value.data = misaligned();  // thresholds and attention must score alike
    call.selector = Selector::kExact;
    const Plan plan = plan_of_call(call, facts);
    ASSERT_EQ(plan.num_stages, 2);
    EXPECT_EQ(plan.stages[0].path, Path::kSimt);
    EXPECT_EQ(plan.stages[1].path, Path::kSimt);
}

TEST(Plan, PrintsWhatItDoes) {
    EXPECT_EQ(to_string(plan_of_call(call_of(DType::kBFloat16), hopper_with_its_kernels())),
              "selection=blocks keys_per_query<=2048 list_width=27 summary_rows=1152 far_pools=0 "
              "tiles=128 x 32 positions workspace=1193984 bytes\n"
              "  block_summaries: path=simt (the stage's one CUDA kernel), 512 blocks\n"
              "  select_blocks: path=sm90 (half precision, aligned, sm 9.0), 128 scan tiles\n"
              "  attention: path=sm90 (half precision, aligned, sm 9.0), 128 tiles");
}

// Everything that the attention reads by vectors counts.
TEST(Plan, AttentionLooksAtTheFarField) {
    alignas(16) char memory[64];
    alignas(16) float sums[4];
    auto params = attention_of(DType::kFloat16);
    const BlockMeans means = {memory, 8192, 128};
    params.far_field = {means, means, sums, memory};
    EXPECT_EQ(plan_of(params, hopper()).path, Path::kSm80);
    params.far_field.means = memory + 8;
    EXPECT_EQ(plan_of(params, hopper()).path, Path::kSimt);
    params.far_field = {means, {memory, 8192, 132}, sums, memory};
    EXPECT_EQ(plan_of(params, hopper()).path, Path::kSimt);
}

}  // namespace
}  // namespace condensate
