// Ranks of items, their total order (rank, then the lower index), and bins that follow it.
#pragma once

#include <cmath>
#include <cstdint>

namespace condensate::kernels::decode {

constexpr int kRankBins = 1024;

// Larger for a larger rank, then for a lower index; never 0.
__device__ __forceinline__ unsigned long long order_key(float rank, uint32_t index) {
    const uint32_t bits = __float_as_uint(rank);
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - index);
}
__device__ __forceinline__ uint32_t index_of(unsigned long long key) {
    return 0xffffffffu - static_cast<uint32_t>(key);
}
__device__ __forceinline__ float rank_of(unsigned long long key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// What a selection is made of: ranks in shared memory, of ascending indices. A rank of +inf or NaN
// is no item.
struct RankedItems {
    const float* ranks;
    int count;
    uint32_t first;  // index of the first

    __device__ static bool is_item(float rank) { return rank < INFINITY; }
    __device__ unsigned long long key(int i, float rank) const {
        return order_key(rank, first + static_cast<uint32_t>(i));
    }
    // Is item i among those whose key is not below?
    __device__ bool reaches(int i, unsigned long long threshold) const {
        const float rank = ranks[i];
        return is_item(rank) && key(i, rank) >= threshold;
    }
};

// Bins of ranks, the largest first. Coarse bins reach down from `top`, 64 an octave of 1 +
// distance; fine ones divide one of them evenly. A larger rank has no larger bin.
struct RankBins {
    float top;
    float first, per_bin;  // fine: distance of the first bin, bins per unit of distance
    int only;              // fine: the coarse bin that is divided

    __device__ float distance(float rank) const { return 1.0f + fmaxf(top - rank, 0.0f); }
    __device__ int coarse(float rank) const {
        const int bin = static_cast<int>(__float_as_uint(distance(rank)) >> 17) - (127 << 6);
        return min(bin, kRankBins - 1);
    }
    __device__ void divide(int bin) {
        const uint32_t bits = static_cast<uint32_t>(bin + (127 << 6)) << 17;
        first = __uint_as_float(bits);
        per_bin = static_cast<float>(kRankBins) / (__uint_as_float(bits + (1u << 17)) - first);
        only = bin;
    }
    __device__ int fine(float rank) const {
        const float offset = (distance(rank) - first) * per_bin;
        return static_cast<int>(fminf(fmaxf(offset, 0.0f), kRankBins - 1.0f));
    }
};

// 2^rank as a share of 2^30, so that sums do not depend on their order.
__device__ __forceinline__ unsigned long long mass_of(float rank) {
    return static_cast<unsigned long long>(exp2f(fminf(rank, 0.0f)) * 0x1p30f);
}

}  // namespace condensate::kernels::decode
