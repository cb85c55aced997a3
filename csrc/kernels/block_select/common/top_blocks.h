// A warp's selection of the blocks of largest mass: by radix, ties to the lower index.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>

#include "kernels/block_select/common/traits.h"

namespace condensate::kernels::block_select {

// A mass that is NaN is 0, one that overflowed the largest float.
__device__ __forceinline__ float finite_mass(float x) { return fminf(fmaxf(x, 0.0f), FLT_MAX); }

// Masses are finite and not negative, so their bits order them.
struct Threshold {
    uint32_t mass;  // the k-th largest
    int ties;       // how many equal to it are among the k
};

// Of n masses, n >= k >= 1. The whole warp calls it; `histogram_smem` is its own kRadixBins
// counters.
__device__ inline Threshold radix_threshold(const uint32_t* masses, int n, int k,
                                            uint32_t* histogram_smem) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x & 31;
    uint32_t prefix = 0, prefix_mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = 0; i < 8; ++i) histogram_smem[lane + 32 * i] = 0;
        __syncwarp();
        for (int i = lane; i < n; i += 32) {
            uint32_t mass = masses[i];
            if ((mass & prefix_mask) == prefix) atomicAdd(&histogram_smem[mass >> shift & 255], 1u);
        }
        __syncwarp();
        // Lane l holds digits 255 - 8 l downwards; find where the count from the top reaches k.
        int counts[8], sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += counts[i] = histogram_smem[255 - 8 * lane - i];
        int above = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(kAll, above, step);
            if (lane >= step) above += other;
        }
        int owner = __ffs(__ballot_sync(kAll, above >= k)) - 1;
        int remaining = k - (above - sum), digit = 255 - 8 * lane;
        bool found = false;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            found |= remaining <= counts[i];
            if (!found) {
                remaining -= counts[i];
                --digit;
            }
        }
        k = __shfl_sync(kAll, remaining, owner);
        digit = __shfl_sync(kAll, digit, owner);
        prefix |= static_cast<uint32_t>(digit) << shift;
        prefix_mask |= 255u << shift;
        __syncwarp();  // the histogram has been read
    }
    return {prefix, k};
}

// Writes those of n blocks (ascending) that the threshold takes, and their masses where masses_out
// is not null; both may be written in place. Returns how many; the whole warp sees what is written.
template <class Blocks>
__device__ inline int write_list(const uint32_t* masses, const Blocks& blocks, int n,
                                 Threshold threshold, int32_t* blocks_out, uint32_t* masses_out) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x & 31;
    const unsigned below = (1u << lane) - 1;
    int count = 0, ties = threshold.ties;
    for (int first = 0; first < n; first += 32) {
        const int i = first + lane;
        const uint32_t mass = i < n ? masses[i] : 0;
        const int32_t block = i < n ? blocks[i] : 0;
        unsigned equal = __ballot_sync(kAll, i < n && mass == threshold.mass);
        bool take = i < n && (mass > threshold.mass ||
                              (mass == threshold.mass && __popc(equal & below) < ties));
        ties -= min(ties, __popc(equal));
        unsigned takers = __ballot_sync(kAll, take);
        __syncwarp();  // all lanes have read what is overwritten now
        if (take) {
            int slot = count + __popc(takers & below);
            blocks_out[slot] = block;
            if (masses_out) masses_out[slot] = mass;
        }
        count += __popc(takers);
    }
    __syncwarp();
    return count;
}

// The threshold that drops the lightest of n masses for as long as those dropped add up to at most
// `allowance`. The whole warp calls it.
__device__ inline Threshold allowance_threshold(const uint32_t* masses, int n, float allowance) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x & 31;
    auto sum_below = [&](uint32_t mass) {
        float sum = 0.0f;
        for (int i = lane; i < n; i += 32)
            if (masses[i] < mass) sum += __uint_as_float(masses[i]);
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
        return sum;
    };
    uint32_t least = 0;  // the largest mass below which all are dropped
    for (uint32_t bit = 1u << 30; bit > 0; bit /= 2)
        if (sum_below(least | bit) <= allowance) least |= bit;
    int equal = 0;
    for (int first = 0; first < n; first += 32)
        equal += __popc(__ballot_sync(kAll, first + lane < n && masses[first + lane] == least));
    // Not all that are equal to it: they would exceed what is left.
    const float left = (allowance - sum_below(least)) / __uint_as_float(max(least, 1u));
    return {least, equal - min(static_cast<int>(left), equal)};
}

// Entries past the list's count are -1.
__device__ inline void pad_list(int32_t* list, int count, int64_t width) {
    for (int64_t i = count + (threadIdx.x & 31); i < width; i += 32) list[i] = -1;
}

// The list of a tile that takes every eligible block.
template <class Blocks>
__device__ void write_all(const Blocks& eligible, int32_t* list, int64_t width) {
    const int count = eligible.count();
    for (int i = threadIdx.x & 31; i < count; i += 32) list[i] = eligible.at(i);
    pad_list(list, count, width);
}

// The list of the `keep` heaviest of n blocks, ascending, shorter where `top_p` lets it be; returns
// its length. Overwrites the masses. The whole warp calls it.
template <class Blocks>
__device__ inline int write_heaviest(uint32_t* masses, const Blocks& blocks, int n, int keep,
                                     float top_p, uint32_t* histogram_smem, int32_t* list,
                                     int64_t width) {
    Threshold threshold = {0, INT_MAX};  // takes all
    if (keep == 0)
        n = 0;
    else if (n > keep)
        threshold = radix_threshold(masses, n, keep, histogram_smem);
    int count = write_list(masses, blocks, n, threshold, list, masses);
    if (top_p > 0.0f) {
        threshold = allowance_threshold(masses, count, 1.0f - top_p);
        count = write_list(masses, list, count, threshold, list, nullptr);
    }
    pad_list(list, count, width);
    return count;
}

// Bits of the lanes with a lower index, or whose blocks come first when those of lanes 0, 4, 8, ...
// come before those of 1, 5, 9, ..., and so on.
__device__ __forceinline__ unsigned lanes_before() { return (1u << (threadIdx.x & 31)) - 1; }
__device__ __forceinline__ unsigned lanes_before_by_quad_lane() {
    constexpr unsigned kFirsts = 0x11111111u;
    const unsigned t = threadIdx.x & 3;
    return kFirsts * ((1u << t) - 1) | (kFirsts << t & lanes_before());
}

// The `keep` blocks of largest mass among those that come by in ascending order. Only a window of
// them is held: whenever it is full it shrinks to the best so far, and what cannot be among them is
// not taken in any more.
struct TopBlocks {
    static constexpr int kMostAdded = 64;  // before make_room() is called again

    // Lies in shared memory, to leave registers to scores.
    struct alignas(16) Window {
        uint32_t* masses;  // [capacity]
        int32_t* blocks;   // [capacity], ascending
        int capacity, keep;
    };

    const Window& window;
    uint32_t* histogram_smem;
    unsigned lanes_before;  // whose blocks come before this lane's
    int count = 0;
    uint32_t least;   // mass that a later block needs
    int next_shrink;  // when so many blocks have come by

    __device__ TopBlocks(const Window& window, uint32_t* histogram_smem, unsigned lanes_before)
        : window(window),
          histogram_smem(histogram_smem),
          lanes_before(lanes_before),
          least(window.keep > 0 ? 0 : UINT_MAX),
          next_shrink(window.keep > 0 ? 3 * window.keep : INT_MAX) {}

    CONDENSATE_HOST_DEVICE static int64_t capacity_for(int64_t keep) {
        return ceil_div(keep + max_i64(keep, 192), 32) * 32;
    }

    // The whole warp calls it, blocks ascending in the order of lanes.
    __device__ __forceinline__ void add(bool eligible, float mass, int block) {
        const uint32_t bits = __float_as_uint(mass);
        const bool take = eligible && bits >= least;
        const unsigned takers = __ballot_sync(0xffffffffu, take);
        if (takers == 0) return;
        if (take) {
            int slot = count + __popc(takers & lanes_before);
            window.masses[slot] = bits;
            window.blocks[slot] = block;
        }
        count += __popc(takers);
    }

    // `seen` blocks have come by. Warps that see as many should shrink at the same time, since they
    // wait for each other: well before the window is expected to be full, and then only when it is.
    __device__ __forceinline__ void make_room(int seen) {
        const int spare = window.capacity - kMostAdded;
        const bool due = seen >= next_shrink;
        if (due) {
            float room = static_cast<float>(spare - window.keep) / static_cast<float>(window.keep);
            next_shrink = static_cast<int>(static_cast<float>(seen) * (1.0f + 0.75f * room));
        }
        if (count <= (due ? window.keep : spare)) return;
        const Window w = window;
        __syncwarp();  // what was added is written
        Threshold threshold = radix_threshold(w.masses, count, w.keep, histogram_smem);
        count = write_list(w.masses, w.blocks, count, threshold, w.blocks, w.masses);
        least = threshold.mass + 1;  // later blocks lose ties
    }

    __device__ int store(float top_p, int32_t* list, int64_t width) {
        const Window w = window;
        __syncwarp();  // what was added is written
        return write_heaviest(w.masses, w.blocks, count, w.keep, top_p, histogram_smem, list,
                              width);
    }
};

}  // namespace condensate::kernels::block_select
