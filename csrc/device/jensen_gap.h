// How far blocks outweigh their mean scores. By Jensen's inequality 64 keys weigh at least 64 times
// 2^(their mean score); the log2 of the ratio is the block's gap. Pools of the far field fall short
// of their keys alike, so the mean gap of a row's sampled blocks mends what is taken from pools.
#pragma once

#include "condensate/far_field.h"
#include "device/softmax.h"

namespace condensate::device {

// A lane's sums over a block, as its keys pass by: of scores, and of weights relative to the
// softmax's references.
template <int kMTiles>
struct BlockSums {
    float scores[kMTiles][2] = {};
    float weights[kMTiles][2] = {};

    // Of raw scores, 8-key tiles kFirst..kFirst + kTiles - 1.
    template <int kFirst, int kTiles, int kNTiles>
    __device__ __forceinline__ void set_scores(const float (&s)[kMTiles][kNTiles][4]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) scores[m][0] = scores[m][1] = 0.0f;
        add_scores<kFirst, kTiles>(s);
    }
    __device__ __forceinline__ void set_weights(const float (&sums)[kMTiles][2]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) weights[m][half] = sums[m][half];
    }
    template <int kFirst, int kTiles, int kNTiles>
    __device__ __forceinline__ void add_scores(const float (&s)[kMTiles][kNTiles][4]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sums[2] = {};  // two short chains of additions instead of a long one
#pragma unroll
                for (int n = kFirst; n < kFirst + kTiles; ++n)
                    sums[n % 2] += s[m][n][2 * half] + s[m][n][2 * half + 1];
                scores[m][half] += sums[0] + sums[1];
            }
        }
    }
    __device__ __forceinline__ void add_weights(const float (&sums)[kMTiles][2]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) weights[m][half] += sums[m][half];
    }
    __device__ __forceinline__ void rescale_weights(const float (&rescale)[kMTiles][2]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) weights[m][half] *= rescale[m][half];
    }
};

template <int kMTiles>
struct JensenGap {
    float total[kMTiles][2] = {};   // log2 of keys' weights less mean scores; a lane's share
    float blocks[kMTiles][2] = {};  // counted

    __device__ __forceinline__ void add(const BlockSums<kMTiles>& block,
                                        const OnlineSoftmax<kMTiles>& softmax, float scale_log2) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float weight = quad_sum(block.weights[m][half]);
                if (!(weight >= kGapLeastWeight)) continue;
                const float lane_share = 0.25f * (__log2f(weight) + softmax.reference[m][half]);
                total[m][half] += lane_share;
                total[m][half] -= scale_log2 / kBlockKeys * block.scores[m][half];
                blocks[m][half] += 1.0f;
            }
        }
    }

    // The mean gap, log2; 0 where there is none. All lanes of a quad call it.
    __device__ __forceinline__ float mean(int m, int half) const {
        constexpr float kLog2Keys = 6.0f;
        static_assert(kBlockKeys == 64, "kLog2Keys");
        const float mean = quad_sum(total[m][half]) / blocks[m][half] - kLog2Keys;
        return fabsf(mean) < INFINITY ? mean : 0.0f;
    }
};

// The share of what pools of this weight stand for, beside attended keys of weight `kept`, when
// keys outweigh pools by 2^log2_gap.
__device__ __forceinline__ float omitted_share(float pools, float kept, float log2_gap) {
    const float share = 1.0f / (1.0f + kept / pools * exp2f(-log2_gap));
    return pools > 0.0f ? fminf(fmaxf(share, 0.0f), 1.0f) : 0.0f;  // 0 for NaN
}

}  // namespace condensate::device
