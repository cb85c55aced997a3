// query, summaries -> lists of blocks.
#include "condensate/condensate.h"
#include "condensate/layout.h"
#include "cpu/kernels.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/status.h"
#include "host/validate.h"
#include "reference/reference.h"

namespace condensate {
namespace {

using P = BlockSelectParams;

// Query heads per KV head whose averaged queries fit a warp's 16 rows, or its 32 (block alone).
constexpr int kNarrowGroup = 16;
constexpr int kWideGroup = 32;
constexpr int kMaxSummaryDim = 256;  // a ring slot of summaries in 99 KB of shared memory
constexpr int kMaxSm90Dim = 128;

bool aligned(const P& p) {
    const Problem& problem = p.problem;
    const bool reads_keys = p.refinement() == Refinement::kKeys;
    return is_aligned16(p.query, problem.dtype, query_extents(problem)) &&
           is_aligned16(p.summaries) &&
           (!reads_keys || is_aligned16(p.key, problem.dtype, key_extents(problem)));
}

const char* sm80_obstacle(const P& p, const DeviceFacts& facts) {
    const Problem& problem = p.problem;
    if (const char* obstacle = mma_obstacle(problem.dtype, aligned(p), facts)) return obstacle;
    const bool wide = p.selector == Selector::kBlock;
    if (problem.group() > kWideGroup) return "more than 32 query heads per KV head to score";
    if (problem.group() > kNarrowGroup && !wide)
        return "more than 16 query heads per KV head to score";
    if (summary_dim(p.selector, static_cast<int>(problem.head_dim)) > kMaxSummaryDim)
        return "summaries of more than 256 elements";
    return nullptr;
}

const char* sm90_obstacle(const P& p, const DeviceFacts& facts) {
    if (const char* obstacle = sm80_obstacle(p, facts)) return obstacle;
    if (const char* obstacle = wgmma_obstacle(facts)) return obstacle;
    if (p.problem.group() > kNarrowGroup) return "more than 16 query heads per KV head";
    if (p.problem.kv_len < 1) return "no keys";
    return p.problem.head_dim > kMaxSm90Dim ? "summaries of more than 128 elements" : nullptr;
}

#if defined(CONDENSATE_WITH_CUDA)
int64_t mma_workspace_bytes(const P& p, const DeviceFacts& facts) {
    return kernels::block_select_workspace_bytes(p, facts.sm_count);
}
int64_t simt_workspace_bytes(const P& p, const DeviceFacts& facts) {
    return kernels::block_select_simt_workspace_bytes(p, facts.sm_count);
}
#endif

void describe(const P& p, Plan* plan) {
    const Problem& problem = p.problem;
    plan->selection = Selection::kBlocks;
    plan->tile_positions = tile_positions(problem.group());
    plan->tiles = problem.batch * problem.kv_heads * num_tiles(problem.query_len, problem.group());
    plan->list_width = p.max_blocks;
    plan->summary_rows = summary_rows(p.selector, problem.kv_len);
    plan->keys_per_query =
        min_i64(problem.kv_len, range_keys(problem, p.far_field) + p.max_blocks * kBlockKeys);
}

Work work(const P& p) {
    const Problem& problem = p.problem;
    return {problem.batch * problem.kv_heads *
                num_scan_tiles(p.selector, problem.query_len, problem.group(), problem.kv_len),
            "scan tiles"};
}

}  // namespace

const StageTable<P>& table_of(const P&) {
    static constexpr StageTable<P> kTable = {
        Stage::kSelectBlocks,
        validate,
        [](const P& p) { return p.problem.batch == 0 || p.problem.query_len == 0; },
        work,
        describe,
        nullptr,
        {{Path::kSm90, kByWgmma, CONDENSATE_SM90_LAUNCHER(block_select_sm90), sm90_obstacle,
          [](const P& p) { return p.selector == Selector::kBlock; },
          CONDENSATE_CUDA_FUNCTION(mma_workspace_bytes)},
         {Path::kSm80, kByMma, CONDENSATE_CUDA_LAUNCHER(block_select_sm80), sm80_obstacle, nullptr,
          CONDENSATE_CUDA_FUNCTION(mma_workspace_bytes)},
         {Path::kSimt, kByMma, CONDENSATE_CUDA_LAUNCHER(block_select_simt), nullptr, nullptr,
          CONDENSATE_CUDA_FUNCTION(simt_workspace_bytes)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) { return cpu::select_blocks(p, launch.executor); }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch&) {
              reference::select_blocks<double>(p);
              return Status{};
          }}},
        5,
        [](const P& p) -> const void* { return p.workspace; }};
    return kTable;
}

int64_t block_select_workspace_bytes(const BlockSelectParams& params, const Executor& executor) {
    if (!executor.cuda || params.problem.kv_heads < 1 || params.problem.query_heads < 1) return 0;
    Context context;
    Plan plan;
    Status status = make_context(executor, &context);
    if (status.ok()) status = plan_alone(params, context.facts, context.environment, &plan);
    return status.ok() ? plan.workspace_bytes : 0;  // select_blocks itself reports the failure
}

Status select_blocks(const BlockSelectParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
