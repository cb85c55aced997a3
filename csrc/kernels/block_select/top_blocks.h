// A warp's radix selection over its tile's records in scratch, and the list it ends in.
#pragma once

#include <cstdint>

#include "kernels/block_select/sweep.h"

namespace condensate::kernels::block_select {

struct Threshold {
    uint32_t key;  // the k-th largest
    int ties;      // how many equal to it are among the k
};

// The k-th largest key among the n words for which to_key(word, &key) is true, with bits below
// kLowestBit taken as 0. There must be at least k such words, k >= 1. The whole warp calls it;
// `histogram` is its own 256 counters.
template <int kLowestBit, class ToKey>
__device__ Threshold radix_threshold(const BlockRecord* records, int n, int k, uint32_t* histogram,
                                     ToKey to_key) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x & 31;
    uint32_t prefix = 0, prefix_mask = 0;
    for (int shift = 24; shift >= kLowestBit; shift -= 8) {
        for (int i = 0; i < 8; ++i) histogram[lane + 32 * i] = 0;
        __syncwarp();
        for (int i = lane; i < n; i += 32) {
            uint32_t key;
            if (to_key(records[i].word, &key) && (key & prefix_mask) == prefix)
                atomicAdd(&histogram[key >> shift & 255], 1u);
        }
        __syncwarp();
        // Lane l holds digits 255 - 8 l downwards; find where the count from the top reaches k.
        int counts[8], sum = 0;
        for (int i = 0; i < 8; ++i) sum += counts[i] = histogram[255 - 8 * lane - i];
        int above = sum;
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(kAll, above, step);
            if (lane >= step) above += other;
        }
        int owner = __ffs(__ballot_sync(kAll, above >= k)) - 1;
        int remaining = k - (above - sum), digit = 255 - 8 * lane;
        for (int i = 0; i < 8 && remaining > counts[i]; ++i) {
            remaining -= counts[i];
            --digit;
        }
        k = __shfl_sync(kAll, remaining, owner);
        digit = __shfl_sync(kAll, digit, owner);
        prefix |= static_cast<uint32_t>(digit) << shift;
        prefix_mask |= 255u << shift;
        __syncwarp();
    }
    return {prefix, k};
}

// Writes the ascending list of blocks that `rank(word)` puts above (2) or at (1) the threshold, the
// latter only while `ties` last; pads with -1 and returns the count.
template <class Rank>
__device__ int write_list(const BlockRecord* records, int n, int ties, Rank rank, int32_t* list,
                          int64_t width) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x & 31;
    const unsigned below = (1u << lane) - 1;
    int count = 0;
    for (int first = 0; first < n; first += 32) {
        int block = first + lane;
        int r = block < n ? rank(records[block].word) : 0;
        unsigned equal = __ballot_sync(kAll, r == 1);
        bool take = r == 2 || (r == 1 && __popc(equal & below) < ties);
        ties -= min(ties, __popc(equal));
        unsigned takers = __ballot_sync(kAll, take);
        if (take) list[count + __popc(takers & below)] = block;
        count += __popc(takers);
    }
    for (int64_t i = count + lane; i < width; i += 32) list[i] = -1;
    return count;
}

}  // namespace condensate::kernels::block_select
