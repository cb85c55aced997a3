// The CPU kernels: threaded over tiles, vectorised, float32 accumulation. Parameters arrive
// validated. A result never depends on the number of threads.
#pragma once

#include "condensate/decode.h"
#include "condensate/params.h"

namespace condensate::cpu {

// The instruction set in use ("avx512", "avx2", "baseline"); CONDENSATE_CPU_ISA forces one, and
// check_isa says so if this machine does not have it.
const char* isa_name();
Status check_isa();

Status block_summaries(const BlockSummaryParams& params, const Executor& executor);
Status select_blocks(const BlockSelectParams& params, const Executor& executor);
Status select_tokens(const TokenSelectParams& params, const Executor& executor);
Status far_pools(const FarPoolsParams& params, const Executor& executor);
Status attention(const AttentionParams& params, const Executor& executor, uint32_t* errors);
Status omitted_mass(const OmittedMassParams& params, const Executor& executor, uint32_t* errors);
Status omitted_from_lse(const OmittedFromLseParams& params, const Executor& executor);
Status merge_states(const MergeStatesParams& params, const Executor& executor);
Status attention_with_kvcache(const DecodeParams& params, const Executor& executor,
                              uint32_t* errors);
Status update_kv_summaries(const UpdateSummariesParams& params, const Executor& executor,
                           uint32_t* errors);

}  // namespace condensate::cpu
