// query, key -> the threshold of every row.
#include "condensate/condensate.h"
#include "condensate/layout.h"
#include "cpu/kernels.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/validate.h"
#include "reference/reference.h"

namespace condensate {
namespace {

using P = TokenSelectParams;

// The attention that uses the thresholds must score on the same path, hence the value.
const char* sm80_obstacle(const P& p, const DeviceFacts& facts) {
    const Problem& problem = p.problem;
    const Extents keys = key_extents(problem);
    const bool aligned = is_aligned16(p.query, problem.dtype, query_extents(problem)) &&
                         is_aligned16(p.key, problem.dtype, keys) &&
                         is_aligned16(p.value, problem.dtype, keys);
    return mma_obstacle(problem.dtype, aligned, facts);
}

void describe(const P& p, Plan* plan) {
    const Problem& problem = p.problem;
    plan->selection = Selection::kTokens;
    plan->tile_positions = tile_positions(problem.group());
    plan->tiles = problem.batch * problem.kv_heads * num_tiles(problem.query_len, problem.group());
    plan->keys_per_query =
        min_i64(problem.kv_len, range_keys(problem, /*far_field=*/false) + p.topk);
}

}  // namespace

const StageTable<P>& table_of(const P&) {
    static constexpr StageTable<P> kTable = {
        Stage::kSelectTokens,
        validate,
        [](const P& p) { return p.problem.batch == 0 || p.problem.query_len == 0; },
        [](const P& p) {
            return Work{p.problem.batch * p.problem.query_heads * p.problem.query_len, "rows"};
        },
        describe,
        nullptr,
        {{Path::kSm80, kByMma, CONDENSATE_CUDA_LAUNCHER(token_select_sm80), sm80_obstacle},
         {Path::kSimt, kByMma, CONDENSATE_CUDA_LAUNCHER(token_select_simt)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) { return cpu::select_tokens(p, launch.executor); }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch&) {
              reference::select_tokens<double>(p);
              return Status{};
          }}},
        4};
    return kTable;
}

Status select_tokens(const TokenSelectParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
