// Online softmax over score tiles in mma accumulator layout, in base 2.
// Invariant per row: the true sum so far is row_sum * 2^row_max, with row_max in units of
// log2; a lane's row_sum covers only its own columns until reduce_sums().
#pragma once

#include <cmath>

#include "ptx/math.h"

namespace condensate::device {

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
// The exponent's reference: -inf (nothing seen yet) must not turn -inf scores into NaN.
__device__ __forceinline__ float finite_reference(float row_max) {
    return row_max == -INFINITY ? 0.0f : row_max;
}

template <int kMTiles>
struct OnlineSoftmax {
    float row_max[kMTiles][2];
    float row_sum[kMTiles][2];

    __device__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            row_max[m][0] = row_max[m][1] = -INFINITY;
            row_sum[m][0] = row_sum[m][1] = 0.0f;
        }
    }

    // Turns raw scores into weights 2^(score * scale_log2 - row_max) and returns in `rescale` what
    // earlier accumulators must be multiplied by; false when every factor of the warp is 1.
    template <int kNTiles>
    __device__ bool step(float (&s)[kMTiles][kNTiles][4], float scale_log2,
                         float (&rescale)[kMTiles][2]) {
        bool changed = false;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float largest = -INFINITY;
#pragma unroll
                for (int n = 0; n < kNTiles; ++n)
                    largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                float previous = row_max[m][half];
                float current = fmaxf(previous, quad_max(largest) * scale_log2);
                changed |= current != previous;
                row_max[m][half] = current;
                float reference = finite_reference(current);
                rescale[m][half] = ptx::exp2_approx(previous - reference);
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        s[m][n][e] = ptx::exp2_approx(fmaf(s[m][n][e], scale_log2, -reference));
                        sum += s[m][n][e];
                    }
                }
                row_sum[m][half] = fmaf(row_sum[m][half], rescale[m][half], sum);
            }
        }
        return __any_sync(0xffffffffu, changed);
    }

    __device__ void reduce_sums() {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            row_sum[m][0] = quad_sum(row_sum[m][0]);
            row_sum[m][1] = quad_sum(row_sum[m][1]);
        }
    }

    // Natural-log sum after reduce_sums(); -inf for an empty row.
    __device__ float lse(int m, int half) const {
        constexpr float kLn2 = 0.693147180559945309f;
        float sum = row_sum[m][half];
        return sum == 0.0f ? -INFINITY : (row_max[m][half] + log2f(sum)) * kLn2;
    }
};

}  // namespace condensate::device
