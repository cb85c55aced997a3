// Two attention results over disjoint supports -> the result over their union.
#include "condensate/condensate.h"
#include "cpu/kernels.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/validate.h"
#include "reference/reference.h"

namespace condensate {

const StageTable<MergeStatesParams>& table_of(const MergeStatesParams&) {
    using P = MergeStatesParams;
    static constexpr StageTable<P> kTable = {
        Stage::kMergeStates,
        validate,
        [](const P& p) { return p.rows == 0; },
        [](const P& p) { return Work{p.rows, "rows"}; },
        [](const P&, Plan*) {},
        nullptr,
        {{Path::kSimt, kOnlyKernel, CONDENSATE_CUDA_LAUNCHER(merge_states)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) { return cpu::merge_states(p, launch.executor); }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch&) {
              reference::merge_states<double>(p);
              return Status{};
          }}},
        3};
    return kTable;
}

Status merge_states(const MergeStatesParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
