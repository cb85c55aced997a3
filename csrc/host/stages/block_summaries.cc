// key -> summaries.
#include "condensate/condensate.h"
#include "cpu/kernels.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/validate.h"
#include "reference/reference.h"

namespace condensate {

const StageTable<BlockSummaryParams>& table_of(const BlockSummaryParams&) {
    using P = BlockSummaryParams;
    static constexpr StageTable<P> kTable = {
        Stage::kBlockSummaries,
        validate,
        [](const P& p) { return p.batch == 0 || p.kv_heads == 0 || p.kv_len == 0; },
        [](const P& p) { return Work{p.batch * p.kv_heads * num_blocks(p.kv_len), "blocks"}; },
        [](const P&, Plan*) {},
        nullptr,
        {{Path::kSimt, kOnlyKernel, CONDENSATE_CUDA_LAUNCHER(block_summary)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) { return cpu::block_summaries(p, launch.executor); }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch&) {
              reference::block_summaries<double>(p);
              return Status{};
          }}},
        3};
    return kTable;
}

Status block_summaries(const BlockSummaryParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
