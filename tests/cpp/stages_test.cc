// The stages end to end on the CPU: which path ran, strict mode, the error word, merging.
#include "host/stages/stages.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include <gtest/gtest.h>

#include "call.h"
#include "condensate/condensate.h"
#include "cpu/kernels.h"
#include "cpu/tile_ops.h"
#include "host/run_stage.h"

namespace condensate::testing {
namespace {

// Sets an environment variable for one scope.
class Variable {
  public:
    Variable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
    ~Variable() { unsetenv(name_); }

  private:
    const char* name_;
};

Call small_call() { return Call({DType::kFloat32, 2, 2, 2, 40, 300, 16, 20, 5, true, 4}); }

TEST(Stages, ForcedPathsRunAndAgree) {
    Call call = small_call();
    ASSERT_TRUE(attention(call.attention(), threaded()).ok());
    EXPECT_EQ(last_plan().stages[0].path, Path::kCpu);
    std::vector<float> lse = call.lse;
    Variable force("CONDENSATE_FORCE_PATH", "cpu_reference");
    ASSERT_TRUE(attention(call.attention(), threaded()).ok());
    EXPECT_EQ(last_plan().stages[0].path, Path::kCpuReference);
    EXPECT_EQ(last_plan().stages[0].stage, Stage::kAttention);
    for (size_t row = 0; row < lse.size(); ++row) EXPECT_NEAR(lse[row], call.lse[row], 1e-5);
}

TEST(Stages, EveryStageRunsOnBothCpuPaths) {
    for (const char* path : {"cpu", "cpu_reference"}) {
        Variable force("CONDENSATE_FORCE_PATH", path);
        Call call = small_call();
        const Executor executor = threaded();
        ASSERT_TRUE(block_summaries(call.block_summaries(Selector::kQuest), executor).ok());
        EXPECT_STREQ(path_name(last_plan().stages[0].path), path);
        ASSERT_TRUE(select_blocks(call.select_blocks(Selector::kQuest, 2), executor).ok());
        EXPECT_EQ(last_plan().selection, Selection::kBlocks);
        ASSERT_TRUE(attention(call.attention(), executor).ok());
        EXPECT_EQ(last_plan().selection, Selection::kGiven);
        EXPECT_EQ(last_plan().far_pools, 0);
        ASSERT_TRUE(far_pools(call.far_pools(), executor).ok());
        EXPECT_EQ(last_plan().stages[0].stage, Stage::kFarPools);
        EXPECT_EQ(last_plan().far_pools, 5);
        ASSERT_TRUE(attention(call.attention(), executor).ok());
        EXPECT_EQ(last_plan().far_pools, 5);
        ASSERT_TRUE(omitted_mass(call.omitted_mass(), executor).ok());
        ASSERT_TRUE(select_tokens(call.select_tokens(9), executor).ok());
        EXPECT_STREQ(path_name(last_plan().stages[0].path), path);
    }
}

TEST(Stages, ImpossibleForcedPathIsAnError) {
    Variable force("CONDENSATE_FORCE_PATH", "simt");
    Call call = small_call();
    Status status = attention(call.attention(), Executor{});
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    EXPECT_NE(std::string(status.message).find("CONDENSATE_FORCE_PATH is simt"), std::string::npos);
}

TEST(Stages, EveryInstructionSetGivesTheSameLists) {
    const cpu::TileOps* tables[cpu::kMaxTileOps];
    cpu::list_tile_ops(tables);
    Call first({DType::kBFloat16, 1, 2, 4, 100, 900, 40, 30, 10, true, 8}, 5, /*integers=*/true);
    for (const cpu::TileOps* table : tables) {
        if (table == nullptr) break;
        Variable force("CONDENSATE_CPU_ISA", table->name);
        EXPECT_STREQ(cpu::isa_name(), table->name);
        Call call({DType::kBFloat16, 1, 2, 4, 100, 900, 40, 30, 10, true, 8}, 5, true);
        ASSERT_TRUE(select_tokens(call.select_tokens(60), threaded()).ok());
        ASSERT_TRUE(attention(call.attention(), threaded()).ok());
        ASSERT_TRUE(block_summaries(call.block_summaries(Selector::kMean), threaded()).ok());
        ASSERT_TRUE(select_blocks(call.select_blocks(Selector::kMean, 3), threaded()).ok());
        if (table == tables[0]) first = std::move(call);
        if (table == tables[0]) continue;
        EXPECT_EQ(call.threshold, first.threshold);
        EXPECT_EQ(call.tie_index, first.tie_index);
        EXPECT_EQ(call.block_indices, first.block_indices);
        for (size_t row = 0; row < call.lse.size(); ++row)
            ASSERT_NEAR(call.lse[row], first.lse[row], 1e-4) << table->name;
    }
    first.threshold.clear();  // the lists are enough
    Variable force("CONDENSATE_CPU_ISA", "mmx");
    Status status = attention(first.attention(), Executor{});
    EXPECT_NE(std::string(status.message).find("CONDENSATE_CPU_ISA is \"mmx\", expected one of"),
              std::string::npos);
}

TEST(Stages, WindowsLargerThanTheContextAreDense) {
    Call call = small_call();
    for (bool causal : {true, false})
        for (int64_t query_len : {1, 40}) {
            call.problem.causal = causal;
            call.problem.query_len = query_len;
            call.problem.window = 0;
            call.problem.anchors = 300;
            ASSERT_TRUE(attention(call.attention(), Executor{}).ok());
            std::vector<unsigned char> out = call.out;
            call.problem.anchors = 0;
            call.problem.window = std::numeric_limits<int32_t>::max();
            ASSERT_TRUE(attention(call.attention(), Executor{}).ok());
            EXPECT_EQ(out, call.out);
        }
}

TEST(Stages, ErrorWordIsStickyUntilCleared) {
    Call call = small_call();
    call.max_blocks = 1;
    call.block_indices.assign(static_cast<size_t>(call.lists()), 99);
    call.block_counts.assign(static_cast<size_t>(call.lists()), 1);
    const Executor executor = threaded();
    uint32_t word = 0;
    ASSERT_TRUE(read_error_word(executor, true, &word).ok());
    ASSERT_TRUE(attention(call.attention(), executor).ok());
    call.max_blocks = 0;
    ASSERT_TRUE(attention(call.attention(), executor).ok());
    ASSERT_TRUE(read_error_word(executor, false, &word).ok());
    EXPECT_EQ(word, kErrorBlockIndex);
    ASSERT_TRUE(read_error_word(executor, true, &word).ok());
    EXPECT_EQ(word, kErrorBlockIndex);
    ASSERT_TRUE(read_error_word(executor, true, &word).ok());
    EXPECT_EQ(word, 0u);
}

TEST(Stages, StrictModeRaises) {
    Variable strict("CONDENSATE_STRICT", "1");
    for (const char* path : {"cpu", "cpu_reference"}) {
        Variable force("CONDENSATE_FORCE_PATH", path);
        Call call = small_call();
        ASSERT_TRUE(attention(call.attention(), Executor{}).ok());
        call.sampled = {0, 40};
        Status status = omitted_mass(call.omitted_mass(), Executor{});
        EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
        EXPECT_STREQ(status.message,
                     "omitted_mass: invalid tensor contents (error word 0x4): rows has an entry "
                     "outside 0..query_len-1; the entries were skipped; fix them, or unset "
                     "CONDENSATE_STRICT to keep skipping.");
        call.max_blocks = 2;
        call.block_indices.assign(static_cast<size_t>(call.lists() * 2), 1);
        call.block_counts.assign(static_cast<size_t>(call.lists()), 3);
        status = attention(call.attention(), Executor{});
        EXPECT_NE(std::string(status.message).find("block_indices has an entry"),
                  std::string::npos);
        EXPECT_NE(std::string(status.message).find("block_counts has a value"), std::string::npos);
        uint32_t word = 1;
        ASSERT_TRUE(read_error_word(Executor{}, false, &word).ok());
        EXPECT_EQ(word, 0u) << "a raised error is not reported twice";
    }
}

TEST(Stages, CudaWithoutCudaKernelsSaysWhatToDo) {
    if (built_with_cuda()) GTEST_SKIP() << "this build has CUDA kernels";
    Call call = small_call();
    Executor executor;
    executor.cuda = true;
    Status status = attention(call.attention(), executor);
    EXPECT_EQ(status.code, StatusCode::kUnsupported);
    EXPECT_NE(std::string(status.message).find("reinstall it where nvcc is found"),
              std::string::npos);
    EXPECT_EQ(block_select_workspace_bytes(call.select_blocks(Selector::kBlock, 1), executor), 0);
}

TEST(Stages, EmptyProblemsWriteNothing) {
    Call call({DType::kFloat32, 1, 1, 1, 0, 10, 8, 4, 0, true, 0});
    EXPECT_TRUE(attention(call.attention(), threaded()).ok());
    EXPECT_TRUE(select_tokens(call.select_tokens(3), threaded()).ok());
    Call no_keys({DType::kFloat32, 1, 1, 1, 3, 0, 8, 4, 2, true, 0});
    EXPECT_TRUE(block_summaries(no_keys.block_summaries(Selector::kBlock), threaded()).ok());
    EXPECT_TRUE(select_blocks(no_keys.select_blocks(Selector::kBlock, 2), threaded()).ok());
    EXPECT_EQ(no_keys.block_counts, std::vector<int32_t>{0});
    EXPECT_EQ(no_keys.block_indices, (std::vector<int32_t>{-1, -1}));
    EXPECT_TRUE(far_pools(no_keys.far_pools(), threaded()).ok());
    EXPECT_TRUE(attention(no_keys.attention(), threaded()).ok());
    EXPECT_EQ(no_keys.lse, std::vector<float>(3, -INFINITY));
    EXPECT_EQ(no_keys.out_at(2, 7), 0.0f);
}

TEST(Stages, AMissingWorkspaceIsNamed) {
    Call call = small_call();
    ASSERT_TRUE(block_summaries(call.block_summaries(Selector::kMean), Executor{}).ok());
    const BlockSelectParams params = call.select_blocks(Selector::kMean, 1);
    Context context;
    ASSERT_TRUE(make_context(Executor{}, &context).ok());
    Plan plan;
    ASSERT_TRUE(plan_alone(params, context.facts, context.environment, &plan).ok());
    plan.stages[0].workspace_bytes = 100;  // as on CUDA
    EXPECT_STREQ(run_stage(params, plan.stages[0], context).message,
                 "select_blocks: workspace is null, expected a pointer to 100 bytes; allocate them "
                 "on the tensors' device.");
}

struct Merge {
    std::vector<float> out_a, out_b, lse_a, lse_b;
    std::vector<float> out = std::vector<float>(8), lse = std::vector<float>(1);
    Merge(float a, float la, float b, float lb) : out_a(8, a), out_b(8, b), lse_a{la}, lse_b{lb} {
        MergeStatesParams p{
            DType::kFloat32, 1,          8,         out_a.data(), lse_a.data(), out_b.data(),
            lse_b.data(),    out.data(), lse.data()};
        EXPECT_TRUE(merge_states(p, Executor{}).ok());
    }
};

TEST(MergeStates, WeightsByTheSoftmaxSums) {
    for (const char* path : {"cpu", "cpu_reference"}) {
        Variable force("CONDENSATE_FORCE_PATH", path);
        Merge half(2.0f, 1.0f, 4.0f, 1.0f);
        EXPECT_FLOAT_EQ(half.out[0], 3.0f);
        EXPECT_FLOAT_EQ(half.lse[0], 1.0f + std::log(2.0f));
        Merge quarter(2.0f, std::log(1.0f), 6.0f, std::log(3.0f));
        EXPECT_FLOAT_EQ(quarter.out[7], 5.0f);
        EXPECT_FLOAT_EQ(quarter.lse[0], std::log(4.0f));
        Merge far(2.0f, 1000.0f, 4.0f, -1000.0f);
        EXPECT_EQ(far.out[0], 2.0f);
        EXPECT_EQ(far.lse[0], 1000.0f);
    }
}

TEST(MergeStates, EmptySidesTakeNoPart) {
    for (const char* path : {"cpu", "cpu_reference"}) {
        Variable force("CONDENSATE_FORCE_PATH", path);
        Merge left(2.0f, 0.5f, NAN, -INFINITY);
        EXPECT_EQ(left.out[0], 2.0f);
        EXPECT_EQ(left.lse[0], 0.5f);
        Merge right(NAN, -INFINITY, 3.0f, -0.5f);
        EXPECT_EQ(right.out[0], 3.0f);
        EXPECT_EQ(right.lse[0], -0.5f);
        Merge none(NAN, -INFINITY, NAN, -INFINITY);
        EXPECT_EQ(none.out[0], 0.0f);
        EXPECT_EQ(none.lse[0], -INFINITY);
        Merge bad(1.0f, NAN, 1.0f, 2.0f);
        EXPECT_TRUE(std::isnan(bad.out[0]));
        EXPECT_TRUE(std::isnan(bad.lse[0]));
    }
}

// Attention over keys in two halves, merged, is attention over all of them.
TEST(MergeStates, RebuildsAttentionFromHalves) {
    Call all({DType::kFloat32, 1, 2, 2, 7, 130, 16, 0, 130, false, 0});
    ASSERT_TRUE(attention(all.attention(), Executor{}).ok());
    Call first = Call({DType::kFloat32, 1, 2, 2, 7, 130, 16, 0, 60, false, 0});
    ASSERT_TRUE(attention(first.attention(), Executor{}).ok());
    Call second = Call({DType::kFloat32, 1, 2, 2, 7, 130, 16, 0, 130, false, 0});
    AttentionParams rest = second.attention();
    rest.problem.kv_len = 70;
    rest.key.data = static_cast<const float*>(rest.key.data) + 60 * rest.key.stride_seq;
    rest.value.data = static_cast<const float*>(rest.value.data) + 60 * rest.value.stride_seq;
    ASSERT_TRUE(attention(rest, Executor{}).ok());
    MergeStatesParams p{DType::kFloat32,   all.rows(),        16,
                        first.out.data(),  first.lse.data(),  second.out.data(),
                        second.lse.data(), second.out.data(), second.lse.data()};
    ASSERT_TRUE(merge_states(p, threaded()).ok());
    for (int64_t row = 0; row < all.rows(); ++row) {
        EXPECT_NEAR(second.lse[static_cast<size_t>(row)], all.lse[static_cast<size_t>(row)], 1e-5);
        for (int64_t d = 0; d < 16; ++d)
            EXPECT_NEAR(second.out_at(row, d), all.out_at(row, d), 1e-5);
    }
}

}  // namespace
}  // namespace condensate::testing
