// The public C++ API: validates, plans, runs. Nothing here throws, exits or allocates tensors.
// call.h has attention() as a whole; here are its stages, each by itself.
#pragma once

#include "condensate/call.h"
#include "condensate/decode.h"
#include "condensate/params.h"

namespace condensate {

// Bytes of workspace that select_blocks needs for these parameters (0 on the CPU).
int64_t block_select_workspace_bytes(const BlockSelectParams& params, const Executor& executor);

Status block_summaries(const BlockSummaryParams& params, const Executor& executor);
Status select_blocks(const BlockSelectParams& params, const Executor& executor);
Status select_tokens(const TokenSelectParams& params, const Executor& executor);
Status far_pools(const FarPoolsParams& params, const Executor& executor);
Status attention(const AttentionParams& params, const Executor& executor);
Status omitted_mass(const OmittedMassParams& params, const Executor& executor);
Status merge_states(const MergeStatesParams& params, const Executor& executor);
Status omitted_from_lse(const OmittedFromLseParams& params, const Executor& executor);

// Decoding over a cache; docs/decoding.md. Bytes of scratch, which depend on the capacity of the
// cache and not on its lengths (0 on the CPU).
int64_t decode_workspace_bytes(const DecodeParams& params, const Executor& executor);
Status attention_with_kvcache(const DecodeParams& params, const Executor& executor);
Status update_kv_summaries(const UpdateSummariesParams& params, const Executor& executor);

// The sticky error word (ErrorBit) of a device; a CUDA executor synchronises its stream first.
Status read_error_word(const Executor& executor, bool clear, uint32_t* word);

// Was this library built with CUDA kernels, and for which architectures ("80,90a")?
bool built_with_cuda();
const char* built_architectures();

}  // namespace condensate
