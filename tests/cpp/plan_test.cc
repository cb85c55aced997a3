// The plan is a pure function: every rule is tested without a device.
#include "host/plan.h"

#include <cstdlib>
#include <string>

#include <gtest/gtest.h>

namespace condensate {
namespace {

DeviceFacts hopper() { return {true, 0, 9, 0, 132, 227 * 1024}; }
DeviceFacts hopper_with_its_kernels() { return {true, 0, 9, 0, 132, 227 * 1024, true}; }
DeviceFacts turing() { return {true, 1, 7, 5, 68, 64 * 1024}; }

PlanRequest request_of(Stage stage, DType dtype) {
    PlanRequest request;
    request.stage = stage;
    Problem& p = request.problem;
    p.dtype = dtype;
    p.batch = 2;
    p.query_heads = 8;
    p.kv_heads = 2;
    p.query_len = 1000;
    p.kv_len = 8192;
    p.head_dim = 128;
    p.window = 256;
    p.anchors = 64;
    request.topk = 1728;
    return request;
}

Plan plan_of(const PlanRequest& request, const DeviceFacts& facts, const Policy& policy = {}) {
    Plan plan;
    Status status = make_plan(request, facts, policy, &plan);
    EXPECT_TRUE(status.ok()) << status.message;
    return plan;
}

std::string refusal(const PlanRequest& request, const DeviceFacts& facts, Path forced) {
    Plan plan;
    Status status = make_plan(request, facts, {true, forced}, &plan);
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    return status.message;
}

TEST(Plan, CpuTensorsRunOnTheCpu) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
        Plan plan = plan_of(request_of(Stage::kAttention, dtype), DeviceFacts{});
        EXPECT_EQ(plan.path, Path::kCpu);
        EXPECT_STREQ(plan.reason, "tensors are on the CPU");
    }
}

TEST(Plan, HopperKernelsWhereTheyFit) {
    const DeviceFacts facts = hopper_with_its_kernels();
    const PlanRequest fits = request_of(Stage::kAttention, DType::kBFloat16);
    EXPECT_EQ(plan_of(fits, facts).path, Path::kSm90);
    EXPECT_EQ(plan_of(fits, hopper()).path, Path::kSm80);
    DeviceFacts blackwell = facts;
    blackwell.sm_major = 10;
    EXPECT_EQ(plan_of(fits, blackwell).path, Path::kSm80);

    struct {
        void (*change)(PlanRequest&);
        const char* reason;
    } const misfits[] = {
        {[](PlanRequest& r) { r.problem.head_dim = 96; }, "head_dim is neither 64 nor 128"},
        {[](PlanRequest& r) { r.problem.query_heads = 34; },
         "more than 16 query heads per KV head"},
        {[](PlanRequest& r) { r.problem.query_len = 31; }, "fewer queries than a tile"},
        {[](PlanRequest& r) { r.problem.kv_len = 0; }, "no keys"},
        {[](PlanRequest& r) { r.boxed = false; }, "a stride that the copy engine cannot take"},
        {[](PlanRequest& r) { r.given_tokens = true; }, "half precision, aligned, sm >= 8.0"},
    };
    for (const auto& misfit : misfits) {
        PlanRequest request = fits;
        misfit.change(request);
        Plan plan = plan_of(request, facts);
        EXPECT_EQ(plan.path, Path::kSm80) << misfit.reason;
        EXPECT_STREQ(plan.reason, misfit.reason);
    }
}

TEST(Plan, HopperSelectionWhereItFits) {
    const DeviceFacts facts = hopper_with_its_kernels();
    PlanRequest request = request_of(Stage::kSelectBlocks, DType::kFloat16);
    EXPECT_EQ(plan_of(request, facts).path, Path::kSm90);
    request.problem.head_dim = 40;  // padded
    EXPECT_EQ(plan_of(request, facts).path, Path::kSm90);
    request.problem.head_dim = 136;
    EXPECT_STREQ(plan_of(request, facts).reason, "summaries of more than 128 elements");
    request = request_of(Stage::kSelectBlocks, DType::kFloat16);
    request.problem.kv_len = 0;
    EXPECT_STREQ(plan_of(request, facts).reason, "no keys");
    request = request_of(Stage::kSelectBlocks, DType::kFloat16);
    request.selector = Selector::kMean;
    EXPECT_EQ(plan_of(request, facts).path, Path::kSm80);
}

TEST(Plan, ForcedSm90RunsSm80InStagesWithoutAKernelOfTheirOwn) {
    const DeviceFacts facts = hopper_with_its_kernels();
    const Policy sm90 = {true, Path::kSm90};
    EXPECT_EQ(plan_of(request_of(Stage::kAttention, DType::kFloat16), facts, sm90).path,
              Path::kSm90);
    EXPECT_EQ(plan_of(request_of(Stage::kOmittedMass, DType::kFloat16), facts, sm90).path,
              Path::kSm80);
    PlanRequest narrow = request_of(Stage::kAttention, DType::kFloat16);
    narrow.problem.head_dim = 80;
    EXPECT_NE(refusal(narrow, facts, Path::kSm90).find("head_dim is neither"), std::string::npos);
}

TEST(Plan, CopyEngineNeedsStridesAboveZero) {
    const ConstTensor4 dense = {nullptr, 4096, 1024, 64}, shared = {nullptr, 0, 1024, 64};
    EXPECT_TRUE(is_boxed(dense, 2, 4, 16));
    EXPECT_FALSE(is_boxed(shared, 2, 4, 16));
    EXPECT_TRUE(is_boxed(shared, 1, 4, 16));  // the stride of an extent of 1 means nothing
}

TEST(Plan, HalfPrecisionUsesMmaWhereItCan) {
    for (Stage stage :
         {Stage::kAttention, Stage::kSelectBlocks, Stage::kSelectTokens, Stage::kOmittedMass}) {
        PlanRequest request = request_of(stage, DType::kBFloat16);
        EXPECT_EQ(plan_of(request, hopper()).path, Path::kSm80);
        EXPECT_EQ(plan_of(request, turing()).path, Path::kSimt);
        EXPECT_STREQ(plan_of(request, turing()).reason, "compute capability below 8.0");
        request.aligned = false;
        EXPECT_EQ(plan_of(request, hopper()).path, Path::kSimt);
        EXPECT_STREQ(plan_of(request, hopper()).reason,
                     "a pointer or stride is not a multiple of 16 bytes");
        request = request_of(stage, DType::kFloat32);
        EXPECT_EQ(plan_of(request, hopper()).path, Path::kSimt);
        EXPECT_STREQ(plan_of(request, hopper()).reason, "float32 has no mma path");
    }
}

TEST(Plan, StagesWithOneCudaKernelIgnoreTheChoice) {
    for (Stage stage : {Stage::kBlockSummaries, Stage::kFarPools, Stage::kMergeStates}) {
        PlanRequest request = request_of(stage, DType::kFloat32);
        request.aligned = false;
        EXPECT_EQ(plan_of(request, hopper()).path, Path::kSimt);
        EXPECT_EQ(plan_of(request, hopper(), {true, Path::kSm80}).path, Path::kSm80);
    }
}

TEST(Plan, ForcedPathsRunOrSayWhyNot) {
    PlanRequest request = request_of(Stage::kAttention, DType::kFloat16);
    EXPECT_EQ(plan_of(request, hopper(), {true, Path::kSimt}).path, Path::kSimt);
    EXPECT_EQ(plan_of(request, hopper(), {true, Path::kSm80}).path, Path::kSm80);
    EXPECT_EQ(plan_of(request, {}, {true, Path::kCpuReference}).path, Path::kCpuReference);
    EXPECT_STREQ(plan_of(request, {}, {true, Path::kCpu}).reason,
                 "forced by CONDENSATE_FORCE_PATH");

    EXPECT_EQ(refusal(request, {}, Path::kSm80),
              "attention: CONDENSATE_FORCE_PATH is sm80, which cannot run this call: the tensors "
              "are on the CPU; unset it, or force cpu or cpu_reference.");
    EXPECT_EQ(refusal(request, hopper(), Path::kCpu),
              "attention: CONDENSATE_FORCE_PATH is cpu, which cannot run this call: the tensors "
              "are on a CUDA device; unset it, or force simt.");
    request.problem.dtype = DType::kFloat32;
    EXPECT_EQ(refusal(request, hopper(), Path::kSm80),
              "attention: CONDENSATE_FORCE_PATH is sm80, which cannot run this call: float32 has "
              "no mma path; unset it, or force simt.");
    EXPECT_NE(refusal(request, turing(), Path::kSm80).find("compute capability below 8.0"),
              std::string::npos);
}

TEST(Plan, SelectionFollowsTheBudget) {
    PlanRequest request = request_of(Stage::kAttention, DType::kFloat32);
    Plan plan = plan_of(request, {});
    EXPECT_EQ(plan.selection, Selection::kBlocks);
    EXPECT_EQ(plan.list_width, 27);
    EXPECT_EQ(plan.summary_rows, 128 * 9);
    EXPECT_EQ(plan.tile_positions, 32);
    EXPECT_EQ(plan.tiles, 2 * 2 * 32);
    EXPECT_EQ(plan.keys_per_query, 2048);

    request.selector = Selector::kExact;
    EXPECT_EQ(plan_of(request, {}).selection, Selection::kTokens);
    EXPECT_EQ(plan_of(request, {}).list_width, 0);
    request.problem.kv_len = 2048;  // 2048 = 64 + 256 + 1728: nothing is left out
    EXPECT_EQ(plan_of(request, {}).selection, Selection::kCovered);
    EXPECT_EQ(plan_of(request, {}).keys_per_query, 2048);
    request.problem.kv_len = 2049;
    EXPECT_EQ(plan_of(request, {}).selection, Selection::kTokens);
    request.topk = 0;
    EXPECT_EQ(plan_of(request, {}).selection, Selection::kNone);
    request.given_lists = true;
    request.max_blocks = 5;
    EXPECT_EQ(plan_of(request, {}).selection, Selection::kGiven);
    EXPECT_EQ(plan_of(request, {}).keys_per_query, 64 + 256 + 320);
    request.given_lists = false;
    request.given_tokens = true;
    EXPECT_EQ(plan_of(request, {}).selection, Selection::kTokens);
    EXPECT_EQ(plan_of(request_of(Stage::kMergeStates, DType::kFloat32), {}).selection,
              Selection::kNone);
}

TEST(Plan, AttendsToEverythingWhereThatIsFaster) {
    PlanRequest request = request_of(Stage::kAttention, DType::kBFloat16);
    auto selection_at = [&](int64_t query_len, int64_t kv_len) {
        request.problem.query_len = query_len;
        request.problem.kv_len = kv_len;
        return plan_of(request, {}).selection;
    };
    // 2048 keys a row; an average row of a causal prefill sees half of them.
    EXPECT_EQ(selection_at(5120, 5120), Selection::kDense);
    EXPECT_EQ(selection_at(5121, 5121), Selection::kBlocks);
    EXPECT_EQ(selection_at(1, 2560), Selection::kDense);
    EXPECT_EQ(selection_at(1, 2561), Selection::kBlocks);
    request.topk = 128;
    EXPECT_EQ(selection_at(1024, 1024), Selection::kDense);
    EXPECT_EQ(selection_at(1023, 1023), Selection::kBlocks);
    request.problem.causal = false;  // 704 keys, and every row sees all
    EXPECT_EQ(selection_at(1024, 1024), Selection::kBlocks);
    request.problem.causal = true;
    request.selector = Selector::kExact;
    EXPECT_EQ(selection_at(1024, 1024), Selection::kTokens);
}

TEST(Plan, FarFieldAttendsWholeBlocksAndCondensesTheRest) {
    PlanRequest request = request_of(Stage::kAttention, DType::kFloat32);
    request.far_field = true;
    EXPECT_EQ(plan_of(request, {}).far_pools, 128);
    // 32 positions with windows of 256 touch at most 6 blocks.
    EXPECT_EQ(plan_of(request, {}).keys_per_query, 64 + 6 * 64 + 1728);
    request.problem.kv_len = 8193;
    EXPECT_EQ(plan_of(request, {}).far_pools, 65);
    request.problem.window = 0;
    request.problem.anchors = 65;
    EXPECT_EQ(plan_of(request, {}).keys_per_query, 128 + 1728);
    request.problem.kv_len = 1000;
    EXPECT_EQ(plan_of(request, {}).selection, Selection::kCovered);
    EXPECT_EQ(plan_of(request, {}).far_pools, 0);
    EXPECT_EQ(plan_of(request, {}).keys_per_query, 1000);
    EXPECT_EQ(plan_of(request_of(Stage::kFarPools, DType::kFloat16), {}).far_pools, 128);
}

TEST(Plan, PrintsOneLine) {
    EXPECT_EQ(to_string(plan_of(request_of(Stage::kAttention, DType::kBFloat16),
                                hopper_with_its_kernels())),
              "attention: path=sm90 (half precision, aligned, sm 9.0) selection=blocks "
              "tiles=128 x 32 positions list_width=27 summary_rows=1152 far_pools=0 "
              "keys_per_query<=2048 "
              "workspace=0 bytes");
}

TEST(Plan, EnvironmentNamesAPath) {
    Policy policy;
    unsetenv("CONDENSATE_FORCE_PATH");
    EXPECT_TRUE(policy_from_environment(&policy).ok());
    EXPECT_FALSE(policy.forced);
    for (Path path : {Path::kCpuReference, Path::kCpu, Path::kSm80, Path::kSimt, Path::kSm90}) {
        setenv("CONDENSATE_FORCE_PATH", path_name(path), 1);
        EXPECT_TRUE(policy_from_environment(&policy).ok());
        EXPECT_TRUE(policy.forced);
        EXPECT_EQ(policy.path, path);
    }
    setenv("CONDENSATE_FORCE_PATH", "gpu", 1);
    EXPECT_STREQ(
        policy_from_environment(&policy).message,
        "CONDENSATE_FORCE_PATH is \"gpu\", expected cpu_reference, cpu, sm80, simt or sm90; "
        "unset it to let the plan choose.");
    unsetenv("CONDENSATE_FORCE_PATH");
}

TEST(Plan, AlignmentLooksAtPointersAndStridesInBytes) {
    alignas(16) char memory[64];
    ConstTensor4 tensor{memory, 64, 32, 8};
    EXPECT_TRUE(is_aligned16(tensor, DType::kFloat16));
    tensor.stride_seq = 4;
    EXPECT_FALSE(is_aligned16(tensor, DType::kFloat16));
    EXPECT_TRUE(is_aligned16(tensor, DType::kFloat32));
    tensor.data = memory + 8;
    EXPECT_FALSE(is_aligned16(tensor, DType::kFloat32));
    EXPECT_TRUE(is_aligned16(ConstTensor4{}, DType::kFloat32));

    const BlockMeans means = {memory, 64, 8};
    alignas(16) float sums[4];
    FarField far = {means, means, sums, memory};
    EXPECT_TRUE(is_aligned16(far, DType::kFloat16));
    far.means = memory + 8;
    EXPECT_FALSE(is_aligned16(far, DType::kFloat16));
    far = {means, {memory, 64, 12}, sums, memory};
    EXPECT_FALSE(is_aligned16(far, DType::kFloat16));
    EXPECT_TRUE(is_aligned16(far, DType::kFloat32));
}

}  // namespace
}  // namespace condensate
