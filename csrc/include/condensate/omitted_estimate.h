// The estimate of the omitted mass of one row, taken from the attention's own scores.
//
// Pools of the far field fall short of the keys that they stand for: by Jensen's inequality 64 keys
// weigh at least 64 times exp(their mean score). By how much, in log, is the gap of a block; the
// mean gap of the row's sampled blocks mends what its pools weigh.
#pragma once

#include <cmath>

#include "condensate/far_field.h"

namespace condensate {

// What a row gathers, or one lane's share of it: lanes add up `pools` and `gaps`.
template <class Real>
struct OmittedEstimate {
    // In units of the softmax's reference. Summed by itself: what the whole sum exceeds the keys'
    // by is rounding where it is small.
    Real pools = 0;
    Real gaps = 0;    // log2, of `blocks` sampled blocks; each log2(64) too large
    Real blocks = 0;  // counted

    CONDENSATE_HOST_DEVICE void rescale(Real factor) { pools *= factor; }
    CONDENSATE_HOST_DEVICE void add_pools(Real weight) { pools += weight; }
    // A sampled block, by the log2 of what its keys weigh and their mean score, also as a log2.
    CONDENSATE_HOST_DEVICE void add_block(Real log2_weight, Real mean_score) {
        gaps += log2_weight;
        gaps -= mean_score;
        blocks += 1;
    }

    // The share of the keys that pools stand for, beside attended keys; `sum` weighs both, as the
    // softmax has it. 0 without pools and for NaN.
    CONDENSATE_HOST_DEVICE float share(Real sum) const {
        constexpr Real kLog2Keys = 6;
        static_assert(kBlockKeys == 64, "kLog2Keys");
        const Real mean = gaps / blocks - kLog2Keys;
        const Real gap = std::isfinite(mean) ? mean : 0;
        const Real share = 1 / (1 + (sum - pools) / pools * std::exp2(-gap));
        if (!(pools > 0) || !(share > 0)) return 0.0f;
        return share < 1 ? static_cast<float>(share) : 1.0f;
    }
};

}  // namespace condensate
