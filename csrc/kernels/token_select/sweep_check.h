// Host side of the key sweeps: what they take, and the choice of instantiation.
#pragma once

#include <climits>
#include <cstdio>
#include <type_traits>

#include "kernels/element.h"

namespace condensate::kernels {

// Key indices are int32 in the sweeps (and in every selection that comes out of them).
constexpr int64_t kMaxSweepKeys = INT_MAX - 64;

inline Status check_sweep(const char* kernel_name, const Problem& p, const ConstTensor4& query,
                          const ConstTensor4& key) {
    const char* reason = nullptr;
    if (p.dtype == DType::kFloat32) reason = "float32 is for the simt kernels";
    if (p.head_dim > kMaxHeadDim || p.head_dim % 8 != 0)
        reason = "head_dim must be a multiple of 8 up to 256";
    if (p.kv_len > kMaxSweepKeys) reason = "kv_len must stay below 2^31 - 64";
    if (!is_wide_aligned(query, p.dtype, p.batch, p.query_heads, p.query_len))
        reason = "query rows must be 16-byte aligned; the simt kernels take any alignment";
    if (!is_wide_aligned(key, p.dtype, p.batch, p.kv_heads, p.kv_len))
        reason = "key rows must be 16-byte aligned; the simt kernels take any alignment";
    Status status;
    if (reason == nullptr) return status;
    status.code = StatusCode::kUnsupported;
    std::snprintf(status.message, sizeof(status.message), "CUDA kernel %s: %s", kernel_name, reason);
    return status;
}

// Calls body(TypeTag<T>{}, integral_constant<int, kDim>{}) for the padded head_dim.
template <class Body>
Status with_sweep_shape(const Problem& p, Body&& body) {
    auto with_dim = [&](auto type) {
        if (p.head_dim <= 64) return body(type, std::integral_constant<int, 64>{});
        if (p.head_dim <= 128) return body(type, std::integral_constant<int, 128>{});
        return body(type, std::integral_constant<int, 256>{});
    };
    return p.dtype == DType::kFloat16 ? with_dim(TypeTag<__half>{})
                                      : with_dim(TypeTag<__nv_bfloat16>{});
}

}  // namespace condensate::kernels
