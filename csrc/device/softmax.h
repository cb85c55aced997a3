// Online softmax over score tiles in mma accumulator layout, in base 2.
// Invariant per row: the true sum so far is row_sum * 2^reference. A lane's row_sum covers only its
// own columns until reduce_sums(). The reference follows the row's maximum lazily: it is raised
// only when a score exceeds it by more than kHeadroom, so most steps neither reduce over the quad
// nor rescale, and weights stay below 2^kHeadroom.
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
// What to subtract from exponents: before anything was seen (-inf) it must not turn -inf scores
// into NaN.
__device__ __forceinline__ float finite_reference(float reference) {
    return reference == -INFINITY ? 0.0f : reference;
}
constexpr float kHeadroom = 8.0f;  // log2
constexpr float kLog2E = 1.44269504088896341f;

// What turns raw scores into log2 weights, the sign aside. Not 0, so that -inf stays -inf, and far
// enough from it that the log2 of a weight divided by it is finite.
__device__ __forceinline__ float exponent_scale(float scale) {
    return fmaxf(fabsf(scale) * kLog2E, 0x1p-110f);
}

template <int kMTiles>
struct OnlineSoftmax {
    float reference[kMTiles][2];  // log2
    float row_sum[kMTiles][2];

    __device__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            reference[m][0] = reference[m][1] = -INFINITY;
            row_sum[m][0] = row_sum[m][1] = 0.0f;
        }
    }

    // Raises the references where these scores ask for it. False if none moved; otherwise
    // `rescale` holds what earlier accumulators must be multiplied by.
    template <int kNTiles>
    __device__ bool raise(const float (&s)[kMTiles][kNTiles][4], float scale_log2,
                          float (&rescale)[kMTiles][2]) {
        float largest[kMTiles][2];
        bool exceeded = false;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = -INFINITY;
#pragma unroll
                for (int n = 0; n < kNTiles; ++n)
                    x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                largest[m][half] = x * scale_log2;
                exceeded |= largest[m][half] > reference[m][half] + kHeadroom;
            }
        }
        if (!__any_sync(0xffffffffu, exceeded)) return false;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Row by row, so that a row's result does not depend on the others of its warp.
                float previous = reference[m][half], x = quad_max(largest[m][half]);
                if (x > previous + kHeadroom) reference[m][half] = x;
                rescale[m][half] =
                    ptx::exp2_approx(previous - finite_reference(reference[m][half]));
                row_sum[m][half] *= rescale[m][half];
            }
        }
        return true;
    }

    // Turns raw scores into weights 2^(score * scale_log2 - reference) and adds them up. A lane's
    // sums over every kPartTiles 8-key tiles go to `parts` as well.
    template <int kNTiles, int kPartTiles = kNTiles>
    __device__ void weigh(float (&s)[kMTiles][kNTiles][4], float scale_log2,
                          float (&parts)[kNTiles / kPartTiles][kMTiles][2]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float exponent = finite_reference(reference[m][half]);
#pragma unroll
                for (int part = 0; part < kNTiles / kPartTiles; ++part) {
                    float sum = 0.0f;
#pragma unroll
                    for (int i = 0; i < kPartTiles; ++i) {
                        float (&tile)[4] = s[m][kPartTiles * part + i];
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e) {
                            tile[e] = ptx::exp2_approx(fmaf(tile[e], scale_log2, -exponent));
                            sum += tile[e];
                        }
                    }
                    parts[part][m][half] = sum;
                    row_sum[m][half] += sum;
                }
            }
        }
    }
    template <int kNTiles>
    __device__ void weigh(float (&s)[kMTiles][kNTiles][4], float scale_log2) {
        float parts[1][kMTiles][2];
        weigh<kNTiles, kNTiles>(s, scale_log2, parts);
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
        return sum == 0.0f ? -INFINITY : (reference[m][half] + log2f(sum)) * kLn2;
    }
};

}  // namespace condensate::device
