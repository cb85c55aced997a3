// attention() as a C++ user calls it: plan, workspace, run; against its stages one by one.
#include "condensate/call.h"

#include <cstdlib>
#include <string>

#include <gtest/gtest.h>

#include "call.h"
#include "host/call.h"
#include "reference/reference.h"

namespace condensate::testing {
namespace {

// A whole call over the tensors of `call`; outputs are (re)allocated there.
struct WholeCall {
    explicit WholeCall(Call* tensors) : data(*tensors) {
        const AttentionParams params = data.attention();
        call.problem = params.problem;
        call.query = params.query;
        call.key = params.key;
        call.value = params.value;
        call.out = params.out;
        call.lse = params.lse;
        call.topk = 128;
        estimate.assign(static_cast<size_t>(data.rows()), NAN);
        call.omitted_mass_estimate = estimate.data();
    }

    Status run(const Executor& executor = threaded()) {
        Status status = plan_attention(call, executor, &plan);
        if (!status.ok()) return status;
        workspace.assign(static_cast<size_t>(plan.workspace_bytes), 0xff);
        return run_attention(call, plan, memory(), executor);
    }
    void* memory() { return workspace.empty() ? nullptr : workspace.data(); }
    template <class T>
    const T* array(int64_t offset) {
        return reinterpret_cast<const T*>(workspace.data() + offset);
    }

    Call& data;
    AttentionCall call;
    Plan plan;
    std::vector<unsigned char> workspace;
    std::vector<float> estimate;
};

Call long_call() { return Call({DType::kBFloat16, 2, 2, 4, 90, 900, 24, 40, 10, true, 8}); }

// The call's lists are those of select_blocks as the far field needs them, with all budgets; its
// output and estimate are the attention's over them.
TEST(Call, BlocksAreItsStages) {
    for (Selector selector : {Selector::kBlock, Selector::kQuest, Selector::kMean})
        for (bool far_field : {true, false}) {
            Call data = long_call();
            WholeCall whole(&data);
            const std::vector<int32_t> budgets = {128, 64};
            whole.call.selector = selector;
            whole.call.far_field = far_field;
            whole.call.head_keys = budgets.data();
            whole.call.top_p = 0.3f;
            ASSERT_TRUE(whole.run().ok());
            EXPECT_EQ(whole.plan.selection, Selection::kBlocks);
            EXPECT_EQ(whole.plan.far_pools, far_field ? 15 : 0);
            const std::vector<unsigned char> out = data.out;
            const std::vector<float> lse = data.lse;

            Call staged = long_call();
            staged.head_keys = budgets;
            staged.top_p = 0.3f;
            staged.lists_for_far_field = far_field;
            staged.refines_by_keys = true;
            ASSERT_TRUE(block_summaries(staged.block_summaries(selector), Executor{}).ok());
            ASSERT_TRUE(select_blocks(staged.select_blocks(selector, 2), Executor{}).ok());
            const auto* indices = whole.array<int32_t>(whole.plan.arrays.block_indices);
            for (size_t n = 0; n < staged.block_indices.size(); ++n)
                ASSERT_EQ(indices[n], staged.block_indices[n]);
            std::vector<float> expected = staged.estimate;
            if (far_field) {
                ASSERT_TRUE(far_pools(staged.far_pools(), Executor{}).ok());
            }
            AttentionParams attend = staged.attention();
            if (far_field) attend.omitted_mass_estimate = expected.data();
            ASSERT_TRUE(attention(attend, Executor{}).ok());
            EXPECT_EQ(out, staged.out);
            EXPECT_EQ(lse, staged.lse);
            EXPECT_EQ(whole.estimate, expected);
        }
}

TEST(Call, TokensAreTheirStagesAndTheEstimateIsExact) {
    for (bool wants_lse : {true, false}) {
        Call data({DType::kFloat32, 1, 2, 2, 50, 300, 16, 20, 5, true, 4});
        WholeCall whole(&data);
        whole.call.selector = Selector::kExact;
        whole.call.topk = 30;
        if (!wants_lse) whole.call.lse = nullptr;
        ASSERT_TRUE(whole.run().ok());
        const std::vector<unsigned char> out = data.out;

        ASSERT_TRUE(select_tokens(data.select_tokens(30), Executor{}).ok());
        ASSERT_TRUE(attention(data.attention(), Executor{}).ok());
        EXPECT_EQ(out, data.out);
        ASSERT_TRUE(omitted_mass(data.omitted_mass(), Executor{}).ok());
        for (size_t row = 0; row < data.omitted.size(); ++row)
            ASSERT_NEAR(whole.estimate[row], data.omitted[row], 1e-5);
    }
}

TEST(Call, AttendsEverythingAndOmitsNothing) {
    Call data({DType::kFloat32, 1, 2, 2, 70, 60, 16, 3, 0, false, 4});  // queries before all keys
    WholeCall whole(&data);
    whole.call.far_field = true;
    ASSERT_TRUE(whole.run().ok());
    EXPECT_EQ(whole.plan.selection, Selection::kCovered);
    EXPECT_EQ(whole.plan.workspace_bytes, 0);
    EXPECT_EQ(whole.estimate, std::vector<float>(whole.estimate.size(), 0.0f));
    const std::vector<unsigned char> out = data.out;
    data.problem.anchors = 60;
    ASSERT_TRUE(attention(data.attention(), Executor{}).ok());
    EXPECT_EQ(out, data.out);
}

TEST(Call, GivenListsWithTheirFarField) {
    for (bool far_field : {true, false}) {
        Call data = long_call();
        data.max_blocks = 1;
        data.block_indices.assign(static_cast<size_t>(data.lists()), 3);
        data.block_counts.assign(static_cast<size_t>(data.lists()), 1);
        WholeCall whole(&data);
        whole.call.given_lists = true;
        whole.call.block_indices = data.block_indices.data();
        whole.call.block_counts = data.block_counts.data();
        whole.call.max_blocks = 1;
        whole.call.far_field = far_field;
        if (!far_field) whole.call.omitted_mass_estimate = nullptr;
        ASSERT_TRUE(whole.run().ok());
        EXPECT_EQ(whole.plan.selection, Selection::kGiven);
        const std::vector<unsigned char> out = data.out;
        if (far_field) {
            ASSERT_TRUE(far_pools(data.far_pools(), Executor{}).ok());
        }
        ASSERT_TRUE(attention(data.attention(), Executor{}).ok());
        EXPECT_EQ(out, data.out);
    }
}

TEST(Call, TheExecutedPlanIsThePrintedOne) {
    Call data = long_call();
    WholeCall whole(&data);
    whole.call.far_field = true;
    for (const char* path : {"cpu", "cpu_reference"}) {
        setenv("CONDENSATE_FORCE_PATH", path, 1);
        ASSERT_TRUE(plan_attention(whole.call, Executor{}, &whole.plan).ok());
        unsetenv("CONDENSATE_FORCE_PATH");  // the plan decides, not the environment of the run
        whole.workspace.assign(static_cast<size_t>(whole.plan.workspace_bytes), 0xff);
        ASSERT_TRUE(run_attention(whole.call, whole.plan, whole.memory(), Executor{}).ok());
        EXPECT_EQ(to_string(last_plan()), to_string(whole.plan));
        EXPECT_STREQ(path_name(last_plan().stages[4].path), path);
        const std::vector<float> lse = data.lse;  // the two paths round differently
        AttentionParams params = data.attention();
        params.block_indices = whole.array<int32_t>(whole.plan.arrays.block_indices);
        params.block_counts = whole.array<int32_t>(whole.plan.arrays.block_counts);
        params.max_blocks = 2;
        ASSERT_TRUE(far_pools(data.far_pools(), Executor{}).ok());
        params.far_field = data.attention().far_field;
        params.lse = data.lse.data();
        params.out = data.out.data();
        whole.call.lse = data.lse.data();
        whole.call.out = data.out.data();
        setenv("CONDENSATE_FORCE_PATH", path, 1);
        ASSERT_TRUE(attention(params, Executor{}).ok());
        unsetenv("CONDENSATE_FORCE_PATH");
        EXPECT_EQ(lse, data.lse) << path;
    }
}

TEST(Call, StagesRunOneByOne) {
    Call data = long_call();
    WholeCall whole(&data);
    whole.call.far_field = true;
    ASSERT_TRUE(whole.run().ok());
    const std::vector<unsigned char> out = data.out;
    data.out.assign(out.size(), 0);
    std::vector<unsigned char> memory(whole.workspace.size());
    for (int i = 0; i < whole.plan.num_stages; ++i)
        ASSERT_TRUE(run_attention_stage(whole.call, whole.plan, i, memory.data(), Executor{}).ok());
    EXPECT_EQ(out, data.out);
}

std::string message(const Status& status) {
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    return status.message;
}

TEST(Call, NamesWhatIsWrong) {
    Call data = long_call();
    WholeCall whole(&data);
    ASSERT_TRUE(whole.run().ok());
    EXPECT_EQ(message(run_attention(whole.call, whole.plan, nullptr, Executor{})),
              "attention: workspace is null, expected a pointer to " +
                  std::to_string(whole.plan.workspace_bytes) +
                  " bytes; allocate plan.workspace_bytes on the tensors' device.");
    EXPECT_NE(message(run_attention(whole.call, whole.plan, whole.workspace.data() + 1, Executor{}))
                  .find("a multiple of 16"),
              std::string::npos);
    AttentionCall other = whole.call;
    other.out = nullptr;
    EXPECT_EQ(message(run_attention(other, whole.plan, whole.memory(), Executor{}))
                  .find("attention: out is null"),
              0u);
    Plan plan;
    ASSERT_TRUE(plan_attention(other, Executor{}, &plan).ok()) << "planning needs no memory";
    for (void (*change)(AttentionCall&) :
         {+[](AttentionCall& c) { c.topk = 256; }, +[](AttentionCall& c) { c.topk = 4096; },
          +[](AttentionCall& c) { c.far_field = true; },
          +[](AttentionCall& c) { c.selector = Selector::kQuest; }}) {
        other = whole.call;
        change(other);
        EXPECT_NE(message(run_attention(other, whole.plan, whole.memory(), Executor{}))
                      .find("the plan is of another call"),
                  std::string::npos);
    }
    Plan on_gpu = whole.plan;
    for (StagePlan& stage : on_gpu.stages) stage.path = Path::kSimt;
    EXPECT_NE(message(run_attention(whole.call, on_gpu, whole.memory(), Executor{}))
                  .find("another kind of device"),
              std::string::npos);
}

TEST(Call, RefusesWhatDoesNotFitTogether) {
    struct {
        void (*change)(AttentionCall&);
        const char* fault;
    } const faults[] = {
        {[](AttentionCall& c) { c.topk = 100; }, "attention: topk is 100"},
        {[](AttentionCall& c) { c.top_p = 1.5f; }, "top_p is 1.5"},
        {[](AttentionCall& c) { c.problem.head_dim = 7; }, "attention: head_dim is 7"},
        {[](AttentionCall& c) { c.problem.kv_heads = 0; }, "query has"},
        {[](AttentionCall& c) { c.problem.scale = -1.0f; }, "scale is -1"},
        {[](AttentionCall& c) {
             c.selector = Selector::kExact;
             c.far_field = true;
         },
         "far_field is given with selector \"exact\""},
        {[](AttentionCall& c) { c.given_lists = true; }, "omitted_mass_estimate is given without"},
    };
    for (const auto& fault : faults) {
        Call data = long_call();
        WholeCall whole(&data);
        fault.change(whole.call);
        const Status status = plan_attention(whole.call, Executor{}, &whole.plan);
        EXPECT_NE(message(status).find(fault.fault), std::string::npos) << status.message;
    }
}

TEST(Call, EmptyCallsWriteNothing) {
    for (bool no_queries : {true, false}) {
        Call data(no_queries ? Shape{DType::kFloat32, 1, 1, 1, 0, 10, 8, 4, 0, true, 0}
                             : Shape{DType::kFloat32, 1, 1, 1, 3, 0, 8, 4, 2, true, 0});
        for (bool given : {true, false}) {
            WholeCall whole(&data);
            whole.call.far_field = true;
            whole.call.given_lists = given;
            ASSERT_TRUE(whole.run().ok());
            EXPECT_EQ(whole.estimate, std::vector<float>(whole.estimate.size(), 0.0f));
        }
    }
}

}  // namespace
}  // namespace condensate::testing
