// Dense decoding: attention within splits of the keys, then their combination.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "condensate/decode.h"
#include "device/float8.h"
#include "kernels/decode/dense/stages.h"
#include "kernels/launchers.h"

namespace condensate::kernels {
namespace {

decode::Partials partials_of(const DecodeParams& params) {
    decode::Partials partials = {};
    partials.max_splits =
        static_cast<int32_t>(decode::Splits(params.kv_heads).most_within(params.cache.capacity()));
    partials.rows = static_cast<int32_t>(params.group() * params.query_len);
    partials.out = static_cast<float*>(params.workspace);
    partials.weight =
        reinterpret_cast<float2*>(partials.out + decode::partial_rows(params) * params.head_dim);
    return partials;
}

Status attend_splits(const DecodeParams& params, const decode::Partials& partials,
                     const LaunchContext& context) {
    switch (params.cache.dtype) {
        case DType::kFloat8E4M3:
            return decode::attend_splits<device::Float8>(params, partials, context);
        case DType::kFloat16:
            return decode::attend_splits<__half>(params, partials, context);
        default:
            return decode::attend_splits<__nv_bfloat16>(params, partials, context);
    }
}

}  // namespace

int64_t decode_dense_workspace_bytes(const DecodeParams& params, const LaunchContext&) {
    return decode::partial_rows(params) *
           (params.head_dim * int64_t{sizeof(float)} + int64_t{sizeof(float2)});
}

Status decode_dense(const DecodeParams& params, const LaunchContext& context) {
    const decode::Partials partials = partials_of(params);
    const Status status = attend_splits(params, partials, context);
    return status.ok() ? decode::combine_splits(params, partials, context) : status;
}

}  // namespace condensate::kernels
