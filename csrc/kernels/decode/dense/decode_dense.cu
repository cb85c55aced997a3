// Dense decoding: attention within splits of the keys, then their combination.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "condensate/decode.h"
#include "device/float8.h"
#include "kernels/decode/dense/stages.h"
#include "kernels/decode/kernels.h"

namespace condensate::kernels::decode {
namespace {

Partials partials_of(const DecodeParams& params) {
    Partials partials = {};
    partials.max_splits =
        static_cast<int32_t>(Splits(params.kv_heads).most_within(params.cache.capacity()));
    partials.rows = static_cast<int32_t>(params.group() * params.query_len);
    partials.out = static_cast<float*>(params.workspace);
    partials.weight =
        reinterpret_cast<float2*>(partials.out + partial_rows(params) * params.head_dim);
    return partials;
}

Status attend_by_cache(const DecodeParams& params, const Partials& partials,
                       const LaunchContext& context) {
    switch (params.cache.dtype) {
        case DType::kFloat8E4M3:
            return attend_splits<device::Float8>(params, partials, context);
        case DType::kFloat16:
            return attend_splits<__half>(params, partials, context);
        default:
            return attend_splits<__nv_bfloat16>(params, partials, context);
    }
}

}  // namespace

int64_t dense_workspace_bytes(const DecodeParams& params) {
    return partial_rows(params) *
           (params.head_dim * int64_t{sizeof(float)} + int64_t{sizeof(float2)});
}

Status run_dense(const DecodeParams& params, const LaunchContext& context) {
    const Partials partials = partials_of(params);
    const Status status = attend_by_cache(params, partials, context);
    return status.ok() ? combine_splits(params, partials, context) : status;
}

}  // namespace condensate::kernels::decode
