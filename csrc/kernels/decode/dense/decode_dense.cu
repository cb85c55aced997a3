// Dense decoding: chooses the types, which have a file each because they compile for long.
#include "condensate/decode.h"
#include "kernels/decode/dense/splits.h"
#include "kernels/decode/dense/types.h"
#include "kernels/launchers.h"

namespace condensate::kernels {

int64_t decode_dense_workspace_bytes(const DecodeParams& params, const LaunchContext&) {
    return decode::partial_rows(params) *
           (params.head_dim * int64_t{sizeof(float)} + int64_t{sizeof(float2)});
}

Status decode_dense(const DecodeParams& params, const LaunchContext& context) {
    const bool half = params.dtype == DType::kFloat16;
    if (params.cache.dtype == DType::kFloat8E4M3) {
        return half ? decode::decode_dense_float8<__half>(params, context)
                    : decode::decode_dense_float8<__nv_bfloat16>(params, context);
    }
    return half ? decode::decode_dense_16bit<__half>(params, context)
                : decode::decode_dense_16bit<__nv_bfloat16>(params, context);
}

}  // namespace condensate::kernels
