// The softmax mass outside a support, from the LSE of the support and of all visible keys.
#pragma once

namespace condensate::kernels {

// 1 - exp(lse - lse_full) in [0, 1]; 0 for a row that sees nothing; NaN spreads.
__device__ __forceinline__ float omitted_from_lse(float lse, float lse_full) {
    if (lse == lse_full) return 0.0f;
    float omitted = -expm1f(lse - lse_full);
    if (omitted < 0.0f) return 0.0f;  // rounding of two nearly equal LSEs
    return omitted > 1.0f ? 1.0f : omitted;
}

}  // namespace condensate::kernels
