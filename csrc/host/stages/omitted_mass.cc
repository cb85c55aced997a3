// What a support leaves out: measured by scoring every key, or from two log-sum-exps.
#include "condensate/condensate.h"
#include "condensate/layout.h"
#include "cpu/kernels.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/validate.h"
#include "reference/reference.h"

namespace condensate {
namespace {

const char* sm80_obstacle(const OmittedMassParams& p, const DeviceFacts& facts) {
    const Problem& problem = p.problem;
    const bool aligned = is_aligned16(p.query, problem.dtype, query_extents(problem)) &&
                         is_aligned16(p.key, problem.dtype, key_extents(problem));
    return mma_obstacle(problem.dtype, aligned, facts);
}

}  // namespace

const StageTable<OmittedMassParams>& table_of(const OmittedMassParams&) {
    using P = OmittedMassParams;
    static constexpr StageTable<P> kTable = {
        Stage::kOmittedMass,
        validate,
        [](const P& p) {
            return p.problem.batch == 0 || p.problem.query_len == 0 || p.num_rows == 0;
        },
        [](const P& p) {
            return Work{p.problem.batch * p.problem.query_heads * p.num_rows, "rows"};
        },
        [](const P& p, Plan* plan) { plan->keys_per_query = p.problem.kv_len; },
        [](const P& p) { return p.rows != nullptr; },
        {{Path::kSm80, kByMma, CONDENSATE_CUDA_LAUNCHER(omitted_mass_sm80), sm80_obstacle},
         {Path::kSimt, kByMma, CONDENSATE_CUDA_LAUNCHER(omitted_mass_simt)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) {
              return cpu::omitted_mass(p, launch.executor, &launch.errors);
          }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch& launch) {
              reference::omitted_mass<double>(p, &launch.errors);
              return Status{};
          }}},
        4};
    return kTable;
}

const StageTable<OmittedFromLseParams>& table_of(const OmittedFromLseParams&) {
    using P = OmittedFromLseParams;
    static constexpr StageTable<P> kTable = {
        Stage::kOmittedFromLse,
        validate,
        [](const P& p) { return p.rows == 0; },
        [](const P& p) { return Work{p.rows, "rows"}; },
        [](const P&, Plan*) {},
        nullptr,
        {{Path::kSimt, kOnlyKernel, CONDENSATE_CUDA_LAUNCHER(omitted_from_lse)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) { return cpu::omitted_from_lse(p, launch.executor); }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch&) {
              reference::omitted_from_lse<double>(p);
              return Status{};
          }}},
        3};
    return kTable;
}

Status omitted_mass(const OmittedMassParams& params, const Executor& executor) {
    return run_alone(params, executor);
}
Status omitted_from_lse(const OmittedFromLseParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
