// What the CTAs of a group tell each other, in global memory (L2), and each CTA's shared memory.
#pragma once

#include <cuda_runtime.h>

#include "condensate/decode.h"
#include "kernels/decode/selected/group.h"

namespace condensate::kernels::decode {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxDecodeGroup = 16;  // query heads per KV head
constexpr int kHeadsAtOnce = 4;      // whose values are accumulated together
constexpr int kRankBins = 1024;
constexpr int kMaxTies = 512;    // of a bin that are ordered at once; more are bisected
constexpr int kBisections = 64;  // bits of an order key
constexpr int kFarTile = 64;     // far-field entries whose weights are in shared memory

// One selection of the largest among items of all CTAs.
struct SelectExchange {
    uint32_t bins[2][kRankBins];                // of all ranks, and of one bin of them
    unsigned long long bin_mass[2][kRankBins];  // fixed point; used with top_p
    uint32_t tie_count;
    uint32_t larger[kGroupCtas];  // items of each CTA in bins above the last one
    uint32_t bisect_count[kBisections];
    unsigned long long bisect_mass[kBisections];
    unsigned long long ties[kMaxTies];  // order keys; not cleared
};

// Of one head's scores, log2: the largest, the sum of 2^(score - largest), and the largest of those
// that can be selected.
struct ScoreSums {
    float largest;
    float sum;
    float selectable;
};

// Sums of one head, of weights against the row's reference.
struct RowSums {
    float attended;
    float condensed;  // far-field terms
    float omitted;    // the estimated mass of what they stand for
};

struct Exchange {
    SelectExchange units;
    SelectExchange tokens;
    ScoreSums scan[kGroupCtas][kMaxDecodeGroup];  // of unit scores
    ScoreSums keys[kGroupCtas][kMaxDecodeGroup];  // of key scores
    RowSums rows[kGroupCtas][kMaxDecodeGroup];
    // then: float partial[kGroupCtas][G][D]; int32 shortlist[units]; unit scores that did not fit
};

// Sizes of one group's part of the workspace and of a CTA's dynamic shared memory; the host fills
// them in once.
struct Sizes {
    int32_t group = 0;  // query heads per KV head
    int32_t head_dim = 0;
    int32_t units_per_cta = 0;  // at most, by the cache's capacity
    int32_t slots_per_cta = 0;  // keys that a CTA scores exactly, at most
    bool unit_scores_in_smem = true;

    CONDENSATE_HOST_DEVICE static int64_t align(int64_t bytes) {
        return ceil_div(bytes, 128) * 128;
    }
    CONDENSATE_HOST_DEVICE int64_t unit_scores_bytes() const {
        return align(int64_t{units_per_cta} * group * 4);
    }
    CONDENSATE_HOST_DEVICE int64_t partial_offset() const { return align(sizeof(Exchange)); }
    CONDENSATE_HOST_DEVICE int64_t shortlist_offset() const {
        return partial_offset() + align(int64_t{kGroupCtas} * group * head_dim * 4);
    }
    CONDENSATE_HOST_DEVICE int64_t unit_scores_offset() const {
        return shortlist_offset() + align(int64_t{slots_per_cta} * kGroupCtas / kUnitKeys * 4);
    }
    CONDENSATE_HOST_DEVICE int64_t workspace_bytes() const {
        return unit_scores_offset() + (unit_scores_in_smem ? 0 : kGroupCtas * unit_scores_bytes());
    }
};

// A value that the compiler computes again where it is asked for, instead of keeping what follows
// from it in registers from phase to phase.
__device__ __forceinline__ int32_t recomputed(int32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// The fixed part of a CTA's shared memory; arrays whose sizes the call decides come behind it.
struct Smem {
    union {
        struct {
            uint32_t bins[kRankBins];
            unsigned long long bin_mass[kRankBins];
        };
        unsigned long long ties[kMaxTies];
    };
    ScoreSums thread_sums[kThreads];
    RowSums warp_rows[kWarps][kHeadsAtOnce];
    float query_factor[kMaxDecodeGroup];  // of the 8-bit query, with the score's scale
    float center_score[kMaxDecodeGroup];
    float normaliser[kMaxDecodeGroup];  // log2 of the sum that ranks are taken against
    float reference[kMaxDecodeGroup];   // log2 that weights are taken against
    float candidate_max[kMaxDecodeGroup];
    uint32_t warp_counts[kWarps];
    unsigned long long warp_masses[kWarps];
    unsigned long long threshold;
    uint32_t flags[4];
    float far_weight[kFarTile][kHeadsAtOnce];
    int32_t far_token[kFarTile];
};

// The arrays behind it.
struct SmemArrays {
    Smem* fixed;
    int8_t* query_s8;     // [16][D], rows past the group are 0
    void* query;          // [16][D], the compute type
    float* accumulators;  // [kWarps][kHeadsAtOnce][D]
    float* key_scores;    // [slots][G], log2; later weights
    int32_t* slot_key;    // [slots], -1 where there is no key
    int32_t* listed;      // [slots] slots that are attended, in order
    float* unit_scores;   // [units][G], log2; here or in the workspace

    CONDENSATE_HOST_DEVICE static int64_t bytes(const Sizes& s) {
        return Sizes::align(sizeof(Smem)) + Sizes::align(16 * s.head_dim) +
               Sizes::align(16 * s.head_dim * 2) +
               Sizes::align(int64_t{kWarps} * kHeadsAtOnce * s.head_dim * 4) +
               Sizes::align(int64_t{s.slots_per_cta} * s.group * 4) +
               2 * Sizes::align(int64_t{s.slots_per_cta} * 4) +
               (s.unit_scores_in_smem ? s.unit_scores_bytes() : 0);
    }
    __device__ SmemArrays(uint8_t* base, const Sizes& s, uint8_t* group_workspace, int rank) {
        auto take = [&](int64_t bytes) {
            uint8_t* p = base;
            base += Sizes::align(bytes);
            return p;
        };
        fixed = reinterpret_cast<Smem*>(take(sizeof(Smem)));
        query_s8 = reinterpret_cast<int8_t*>(take(16 * s.head_dim));
        query = take(16 * s.head_dim * 2);
        accumulators =
            reinterpret_cast<float*>(take(int64_t{kWarps} * kHeadsAtOnce * s.head_dim * 4));
        key_scores = reinterpret_cast<float*>(take(int64_t{s.slots_per_cta} * s.group * 4));
        slot_key = reinterpret_cast<int32_t*>(take(int64_t{s.slots_per_cta} * 4));
        listed = reinterpret_cast<int32_t*>(take(int64_t{s.slots_per_cta} * 4));
        unit_scores = reinterpret_cast<float*>(s.unit_scores_in_smem
                                                   ? base
                                                   : group_workspace + s.unit_scores_offset() +
                                                         rank * s.unit_scores_bytes());
    }
};

}  // namespace condensate::kernels::decode
