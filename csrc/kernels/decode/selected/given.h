// The caller's list of tokens: entries that are out of range, or not above the valid ones before
// them, do not exist.
#pragma once

#include "kernels/decode/selected/workspace.h"

namespace condensate::kernels::decode {

struct GivenTokens {
    const int32_t* tokens = nullptr;
    int32_t visible = 0;
    int32_t count = 0, begin = 0;  // of the list, and where this CTA's share of it begins
    int32_t largest = -1;          // of the entries before `begin`

    __device__ bool given() const { return tokens != nullptr; }

    __device__ void read(const DecodeParams& params, const Item& item, int64_t list,
                         uint32_t* error_word) {
        tokens = params.token_indices + list * params.topk;
        visible = item.span.visible;
        const int64_t told = params.token_counts[list];
        count = static_cast<int32_t>(max_i64(min_i64(told, params.topk), 0));
        if (told != count && threadIdx.x == 0) atomicOr(error_word, kErrorBlockCount);
    }
    __device__ int32_t in_range(int i) const {
        const int32_t token = i < count ? tokens[i] : -1;
        return token < visible ? token : -1;
    }
    // All threads: looks at everything before entry `first`.
    __device__ void start_at(uint32_t& smem_largest, int first) {
        begin = max(first, 0);
        int32_t before = -1;
        for (int i = static_cast<int>(threadIdx.x); i < min(begin, count);
             i += static_cast<int>(blockDim.x))
            before = max(before, in_range(i));
        before = __reduce_max_sync(0xffffffffu, before);
        if (threadIdx.x == 0) smem_largest = 0;
        __syncthreads();
        if (threadIdx.x % 32 == 0) atomicMax(&smem_largest, static_cast<uint32_t>(before + 1));
        __syncthreads();
        largest = static_cast<int32_t>(smem_largest) - 1;
    }
    __device__ int32_t key(int i, uint32_t* error_word) const {
        if (i >= count) return -1;
        const int32_t token = in_range(i);
        int32_t before = largest;
        if (i > begin && in_range(i - 1) >= token) {
            before = INT32_MAX;  // the entry before is no smaller
        } else {
            for (int other = begin; other < i; ++other) before = max(before, in_range(other));
        }
        if (token > before) return token;
        atomicOr(error_word, kErrorTokenIndex);
        return -1;
    }
    __device__ int32_t key_of_slot(const DecodeSpan& span, const SlotRuns& runs, int slot,
                                   uint32_t* error_word) const {
        if (!runs.is_listed(slot / kUnitKeys)) return runs.range_key(span, slot);
        const int32_t token = key(slot - runs.anchor_runs * kUnitKeys, error_word);
        return span.is_candidate(token) ? token : -1;
    }
};

}  // namespace condensate::kernels::decode
