// Means of blocks -> pools of the far field.
#include "condensate/condensate.h"
#include "cpu/kernels.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/validate.h"
#include "reference/reference.h"

namespace condensate {

const StageTable<FarPoolsParams>& table_of(const FarPoolsParams&) {
    using P = FarPoolsParams;
    static constexpr StageTable<P> kTable = {
        Stage::kFarPools,
        validate,
        [](const P& p) { return p.batch == 0 || p.kv_heads == 0 || p.kv_len == 0; },
        [](const P& p) { return Work{p.batch * p.kv_heads * num_far_pools(p.kv_len), "pools"}; },
        [](const P& p, Plan* plan) { plan->far_pools = num_far_pools(p.kv_len); },
        nullptr,
        {{Path::kSimt, kOnlyKernel, CONDENSATE_CUDA_LAUNCHER(far_pools_cuda)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) { return cpu::far_pools(p, launch.executor); }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch&) {
              reference::far_pools<double>(p);
              return Status{};
          }}},
        3};
    return kTable;
}

Status far_pools(const FarPoolsParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
