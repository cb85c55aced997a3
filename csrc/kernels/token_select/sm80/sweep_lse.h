// Log-sum-exp of the rows of a key sweep over their visible keys.
#pragma once

#include "device/softmax.h"
#include "kernels/token_select/sm80/key_sweep.h"

namespace condensate::kernels {

constexpr float kLn2 = 0.693147180559945309f;

// sum * 2^reference of a row over the keys of one column of warps.
struct LsePart {
    float reference;
    float sum;
};

// Scales raw products and hides the keys at or past each row's end; `scores` become weights.
template <int kDim>
__device__ __forceinline__ void add_to_lse(device::OnlineSoftmax<kSweepMTiles>& softmax,
                                           SweepScores<kDim>& scores, float scale,
                                           const int32_t (&visible_end)[kSweepMTiles][2],
                                           int32_t first_key) {
    SweepLane lane;
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m) {
#pragma unroll
        for (int n = 0; n < SweepScores<kDim>::kNTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                bool visible = first_key + lane.warp_key(n, e) < visible_end[m][e / 2];
                float score = __fmul_rn(scores.acc[m][n][e], scale);
                scores.acc[m][n][e] = visible ? score : -INFINITY;
            }
        }
    }
    float rescale[kSweepMTiles][2];
    softmax.raise(scores.acc, device::kLog2E, rescale);
    softmax.weigh(scores.acc, device::kLog2E);
}

__device__ __forceinline__ float merge_lse(LsePart a, LsePart b) {
    float largest = fmaxf(a.reference, b.reference);
    float reference = device::finite_reference(largest);
    float sum = a.sum * exp2f(a.reference - reference) + b.sum * exp2f(b.reference - reference);
    return sum == 0.0f ? -INFINITY : (largest + log2f(sum)) * kLn2;
}

// Natural-log LSE of row threadIdx.x in threads 0..kSweepRows-1. All threads call it; `parts` is
// shared memory that nobody else uses until the next __syncthreads().
__device__ __forceinline__ float finish_lse(device::OnlineSoftmax<kSweepMTiles>& softmax,
                                            LsePart (&parts)[kSweepRows][kSweepWarpsN]) {
    SweepLane lane;
    softmax.reduce_sums();
    if (lane.lane % 4 == 0) {
#pragma unroll
        for (int m = 0; m < kSweepMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                parts[lane.row(m, half)][lane.warp_n] = {softmax.reference[m][half],
                                                         softmax.row_sum[m][half]};
            }
        }
    }
    __syncthreads();
    int row = static_cast<int>(threadIdx.x);
    return row < kSweepRows ? merge_lse(parts[row][0], parts[row][1]) : 0.0f;
}

}  // namespace condensate::kernels
