// Chooses among the kernels of decoding, by sizes that the host knows; lengths are read on the
// device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "kernels/decode/kernels.h"

namespace condensate::kernels {
namespace {

// No sequence that fits the cache has more candidates than a shortlist: all are attended densely.
bool is_dense(const DecodeParams& p) {
    return p.mode == DecodeMode::kDense ||
           (p.mode == DecodeMode::kSelectAndAttend && p.cache.capacity() <= p.shortlist);
}

}  // namespace

int64_t decode_workspace_bytes(const DecodeParams& params) {
    return is_dense(params) ? decode::dense_workspace_bytes(params)
                            : decode::selected_workspace_bytes(params);
}

Status decode_attention(const DecodeParams& params, const LaunchContext& context) {
    if (is_dense(params)) return decode::run_dense(params, context);
    const bool narrow = params.cache.dtype == DType::kFloat8E4M3;
    if (params.dtype == DType::kFloat16)
        return narrow ? decode::run_selected<__half, __nv_fp8_e4m3>(params, context)
                      : decode::run_selected<__half, __half>(params, context);
    return narrow ? decode::run_selected<__nv_bfloat16, __nv_fp8_e4m3>(params, context)
                  : decode::run_selected<__nv_bfloat16, __nv_bfloat16>(params, context);
}

}  // namespace condensate::kernels
