// How dense decoding divides the keys of a sequence: into splits by the sequence's own length and
// the model's KV heads, so that a result does not depend on what else is in the batch.
#pragma once

#include "condensate/decode.h"

namespace condensate::kernels::decode {

constexpr int kMinSplitKeys = 128;
constexpr int kMaxSplits = 128;  // of a sequence
// Of all KV heads of a sequence, about: work for all SMs, and not more, since every split costs the
// traffic of its partial outputs.
constexpr int kSequenceSplits = 256;

struct Splits {
    int most;  // of a sequence and KV head

    CONDENSATE_HOST_DEVICE explicit Splits(int64_t kv_heads) : most(kMaxSplits) {
        while (most > 32 && most * kv_heads > kSequenceSplits) most /= 2;
    }
    // Keys of a split: a power of two.
    CONDENSATE_HOST_DEVICE int64_t keys(int64_t length) const {
        int64_t keys = kMinSplitKeys;
        while (keys * most < length) keys *= 2;
        return keys;
    }
    CONDENSATE_HOST_DEVICE int64_t count(int64_t length) const {
        return ceil_div(length, keys(length));
    }
    // Of any length up to `capacity`.
    CONDENSATE_HOST_DEVICE int64_t most_within(int64_t capacity) const {
        return min_i64(ceil_div(capacity, kMinSplitKeys), most);
    }
};

// A sequence's length, bounded by its pages. `clamped` says that it was not within them.
CONDENSATE_HOST_DEVICE int64_t bounded_length(int64_t length, int64_t capacity, bool* clamped) {
    const int64_t bounded = max_i64(min_i64(length, capacity), 0);
    *clamped = bounded != length;
    return bounded;
}

// What every split leaves for the combination, for R = G * Lq rows (row = head * Lq + query):
// unnormalised outputs, and (reference, sum) in base 2 as in device/softmax.h.
struct Partials {
    float* out;      // [B, Hkv, max_splits, R, D]
    float2* weight;  // [B, Hkv, max_splits, R]
    int32_t max_splits;
    int32_t rows;  // R

    CONDENSATE_HOST_DEVICE int64_t row(int64_t flat_head, int64_t split, int64_t r) const {
        return (flat_head * max_splits + split) * rows + r;
    }
};
CONDENSATE_HOST_DEVICE int64_t partial_rows(const DecodeParams& p) {
    return p.batch * p.query_heads * p.query_len *
           Splits(p.kv_heads).most_within(p.cache.capacity());
}

}  // namespace condensate::kernels::decode
