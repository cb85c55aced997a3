// Every CUDA entry point that a plan can choose (host/stages/). Parameters arrive validated.
#pragma once

#include <cuda_runtime_api.h>

#include "condensate/decode.h"
#include "condensate/params.h"

namespace condensate::kernels {

// Facts of the device and the call that a launcher needs.
struct LaunchContext {
    cudaStream_t stream = nullptr;
    int sm_count = 0;
    int sm_major = 0;
    int max_smem_per_block_bytes = 0;  // opt-in limit
    uint32_t* error_word = nullptr;    // device memory, sticky, see ErrorBit
};

Status block_summary(const BlockSummaryParams& params, const LaunchContext& context);
Status omitted_from_lse(const OmittedFromLseParams& params, const LaunchContext& context);
Status merge_states(const MergeStatesParams& params, const LaunchContext& context);
Status far_pools_cuda(const FarPoolsParams& params, const LaunchContext& context);

// sm90: wgmma, in builds with CONDENSATE_WITH_SM90A. sm80: mma.sync, float16 and bfloat16. simt:
// FFMA, every dtype; the only path of float32.
int64_t block_select_workspace_bytes(const BlockSelectParams& params, int sm_count);
int64_t block_select_simt_workspace_bytes(const BlockSelectParams& params, int sm_count);
Status block_select_sm80(const BlockSelectParams& params, const LaunchContext& context);
Status block_select_sm90(const BlockSelectParams& params, const LaunchContext& context);
Status block_select_simt(const BlockSelectParams& params, const LaunchContext& context);
Status token_select_sm80(const TokenSelectParams& params, const LaunchContext& context);
Status token_select_simt(const TokenSelectParams& params, const LaunchContext& context);
Status attention_sm80(const AttentionParams& params, const LaunchContext& context);
Status attention_sm90(const AttentionParams& params, const LaunchContext& context);
Status attention_simt(const AttentionParams& params, const LaunchContext& context);
Status omitted_mass_sm80(const OmittedMassParams& params, const LaunchContext& context);
Status omitted_mass_simt(const OmittedMassParams& params, const LaunchContext& context);

// Decoding over a cache: mma.sync, float16 and bfloat16 queries, caches of their type or e4m3.
Status update_summaries(const UpdateSummariesParams& params, const LaunchContext& context);
int64_t decode_workspace_bytes(const DecodeParams& params);
Status decode_attention(const DecodeParams& params, const LaunchContext& context);

}  // namespace condensate::kernels
