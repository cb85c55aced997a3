// Host side of the key sweeps: what they take, and the choice of instantiation.
#pragma once

#include <climits>
#include <cstdio>
#include <type_traits>

#include "condensate/params.h"
#include "device/element.h"

namespace condensate::kernels {

// Key indices are int32 in the sweeps, and in every selection that comes out of them.
constexpr int64_t kMaxSweepKeys = INT_MAX - 64;

inline Status refuse_sweep(const char* kernel_name, const char* reason) {
    Status status;
    status.code = StatusCode::kUnsupported;
    std::snprintf(status.message, sizeof(status.message), "CUDA kernel %s: %s", kernel_name,
                  reason);
    return status;
}

inline Status check_key_count(const char* kernel_name, const Problem& p) {
    if (p.kv_len > kMaxSweepKeys)
        return refuse_sweep(kernel_name, "kv_len must be below 2^31 - 64");
    return {};
}

// What the mma.sync sweeps need; the simt sweeps take everything else.
inline Status check_sweep(const char* kernel_name, const Problem& p, const ConstTensor4& query,
                          const ConstTensor4& key) {
    if (p.dtype == DType::kFloat32) {
        return refuse_sweep(kernel_name, "float32 needs the simt kernel");
    }
    if (!is_wide_aligned(query, p.dtype, p.batch, p.query_heads, p.query_len) ||
        !is_wide_aligned(key, p.dtype, p.batch, p.kv_heads, p.kv_len)) {
        return refuse_sweep(kernel_name, "rows that are not 16-byte aligned need the simt kernel");
    }
    return check_key_count(kernel_name, p);
}

// A window past all keys means the same as one that just covers them, and cannot overflow.
inline Problem bound_window(Problem problem) {
    problem.window = min_i64(problem.window, problem.kv_len + problem.query_len);
    return problem;
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
