// The largest of many items that a CTA, or the CTAs of a group, hold: exact, in a total order
// (rank, then the lower index). A histogram over ranks finds the bin where the selection ends; the
// items of that bin are ordered among each other. Where they are many, the bin is divided once
// more; where they still are (equal ranks everywhere), the end is bisected.
#pragma once

#include "kernels/decode/selected/workspace.h"

namespace condensate::kernels::decode {

// Larger for a larger rank, then for a lower index; 0 is no item.
__device__ __forceinline__ unsigned long long order_key(float rank, uint32_t index) {
    const float ordered_rank = rank == rank ? rank : -INFINITY;
    const uint32_t bits = __float_as_uint(ordered_rank);
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

struct Selection {
    unsigned long long threshold;  // selected are the items whose key is not below
    uint32_t before;               // selected items of lower CTAs
    uint32_t count;                // of all CTAs
};

template <int kThreads>
struct SelectSmem {
    static constexpr int kWarps = kThreads / 32;
    uint32_t bins[kRankBins];
    unsigned long long bin_mass[kRankBins];  // fixed point; used with top_p
    unsigned long long ties[kMaxTies];
    unsigned long long warp_masses[kWarps];
    unsigned long long threshold;
    uint32_t warp_counts[kWarps];
    uint32_t tie_count;
    uint32_t last[3];  // bin, items above it, items in it
};

template <int kThreads>
__device__ __forceinline__ uint32_t block_sum(SelectSmem<kThreads>& smem, uint32_t value) {
    value = __reduce_add_sync(0xffffffffu, value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) smem.warp_counts[threadIdx.x / 32] = value;
    __syncthreads();
    uint32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) sum += smem.warp_counts[w];
    return sum;
}
template <int kThreads>
__device__ __forceinline__ unsigned long long block_sum(SelectSmem<kThreads>& smem,
                                                        unsigned long long value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) smem.warp_masses[threadIdx.x / 32] = value;
    __syncthreads();
    unsigned long long sum = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) sum += smem.warp_masses[w];
    return sum;
}

// Calls emit(i, place) for every i in [0, count) with flag(i), places counting from 0 in order.
// Returns how many there were. A warp looks at consecutive items; flag is asked twice.
template <int kThreads, class Flag, class Emit>
__device__ uint32_t compact(SelectSmem<kThreads>& smem, int count, Flag&& flag, Emit&& emit) {
    constexpr int kWarps = kThreads / 32;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int each = (count + 32 * kWarps - 1) / (32 * kWarps) * 32;
    const int begin = warp * each, end = min(begin + each, count);
    uint32_t mine = 0;
    for (int first = begin; first < end; first += 32) {
        const int i = first + lane;
        mine += static_cast<uint32_t>(__popc(__ballot_sync(0xffffffffu, i < end && flag(i))));
    }
    __syncthreads();
    if (lane == 0) smem.warp_counts[warp] = mine;
    __syncthreads();
    uint32_t before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        before += w < warp ? smem.warp_counts[w] : 0u;
        all += smem.warp_counts[w];
    }
    for (int first = begin; first < end; first += 32) {
        const int i = first + lane;
        const bool set = i < end && flag(i);
        const uint32_t ballot = __ballot_sync(0xffffffffu, set);
        if (set) emit(i, before + static_cast<uint32_t>(__popc(ballot & ((1u << lane) - 1u))));
        before += static_cast<uint32_t>(__popc(ballot));
    }
    __syncthreads();
    return all;
}

// Where a selection ends. At most `most` items are selected, and with masses only as many of the
// largest as leave no more than `rest` of them to the others.
struct End {
    uint32_t most;
    bool by_mass;
    unsigned long long rest;

    // Is an item selected that so many, of so much mass, are larger than?
    __device__ bool allows(uint32_t larger, unsigned long long mass,
                           unsigned long long total) const {
        return larger < most && (!by_mass || total - mass > rest);
    }
};

struct LastBin {
    int bin;                        // kRankBins: every item is selected
    uint32_t above;                 // items in the bins before it
    uint32_t inside;                // items in it
    unsigned long long mass_above;  // with masses
    unsigned long long mass_total;
};

// The bin of smem.bins where the selection ends; `start` says what lies above the first bin.
template <int kThreads>
__device__ LastBin find_last_bin(SelectSmem<kThreads>& smem, const LastBin& start, bool divided,
                                 const End& end) {
    constexpr int kEach = kRankBins / kThreads, kWarps = kThreads / 32;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t items[kEach], sum = 0;
    unsigned long long masses[kEach] = {}, mass_sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        items[e] = smem.bins[static_cast<int>(threadIdx.x) * kEach + e];
        sum += items[e];
        if (end.by_mass) {
            masses[e] = smem.bin_mass[static_cast<int>(threadIdx.x) * kEach + e];
            mass_sum += masses[e];
        }
    }
    uint32_t before = sum;  // inclusive over the warp, then exclusive over the CTA
    unsigned long long mass_before = mass_sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane >= offset) before += other;
        if (end.by_mass) {
            const unsigned long long mass = __shfl_up_sync(0xffffffffu, mass_before, offset);
            if (lane >= offset) mass_before += mass;
        }
    }
    if (lane == 31) {
        smem.warp_counts[warp] = before;
        smem.warp_masses[warp] = mass_before;
    }
    if (threadIdx.x == 0) smem.last[0] = kRankBins;
    __syncthreads();
    before += start.above - sum;
    mass_before += start.mass_above - mass_sum;
    unsigned long long total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        before += w < warp ? smem.warp_counts[w] : 0u;
        mass_before += w < warp ? smem.warp_masses[w] : 0ull;
        total += smem.warp_masses[w];
    }
    if (divided) total = start.mass_total;
    // Each thread looks at its own bins; the one in which the selection ends tells the others.
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const uint32_t after = before + items[e];
        const unsigned long long mass_after = mass_before + masses[e];
        if (end.allows(before, mass_before, total) && !end.allows(after, mass_after, total)) {
            smem.last[0] = threadIdx.x * kEach + static_cast<uint32_t>(e);
            smem.last[1] = before;
            smem.last[2] = items[e];
            smem.threshold = mass_before;
        }
        before = after;
        mass_before = mass_after;
    }
    __syncthreads();
    const LastBin last = {static_cast<int>(smem.last[0]), smem.last[1], smem.last[2],
                          smem.threshold, total};
    __syncthreads();
    return last;
}

// Counts this CTA's items in smem.bins, then the group's.
template <int kThreads, class KeyOf>
__device__ void count_ranks(const Group& group, SelectSmem<kThreads>& smem,
                            SelectExchange* exchange, const RankBins& bins, int count, bool by_mass,
                            KeyOf&& key_of) {
    const bool divided = bins.only >= 0;
    for (int b = static_cast<int>(threadIdx.x); b < kRankBins; b += kThreads) {
        smem.bins[b] = 0;
        if (by_mass) smem.bin_mass[b] = 0;
    }
    if (threadIdx.x == 0) smem.tie_count = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const unsigned long long key = key_of(i);
        if (key == 0) continue;
        const float rank = rank_of(key);
        const int coarse = bins.coarse(rank);
        if (divided && coarse != bins.only) continue;
        const int bin = divided ? bins.fine(rank) : coarse;
        atomicAdd(&smem.bins[bin], 1u);
        if (by_mass) atomicAdd(&smem.bin_mass[bin], mass_of(rank));
    }
    __syncthreads();
    if (group.size == 1) return;
    uint32_t* shared = exchange->bins[divided];
    for (int b = static_cast<int>(threadIdx.x); b < kRankBins; b += kThreads)
        if (smem.bins[b] != 0) atomicAdd(&shared[b], smem.bins[b]);
    group.sync();
    for (int b = static_cast<int>(threadIdx.x); b < kRankBins; b += kThreads)
        smem.bins[b] = __ldcg(&shared[b]);
    __syncthreads();
}

// The lowest key that is selected among smem.ties, the items of the last bin.
template <int kThreads>
__device__ unsigned long long order_ties(SelectSmem<kThreads>& smem, const LastBin& last,
                                         const End& end) {
    if (threadIdx.x == 0) smem.threshold = ~0ull;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < last.inside; i += kThreads) {
        const unsigned long long key = smem.ties[i];
        uint32_t larger = last.above;
        unsigned long long mass = last.mass_above;
        for (uint32_t other = 0; other < last.inside; ++other) {
            const bool comes_first = smem.ties[other] > key;
            larger += comes_first;
            if (end.by_mass && comes_first) mass += mass_of(rank_of(smem.ties[other]));
        }
        if (end.allows(larger, mass, last.mass_total)) atomicMin(&smem.threshold, key);
    }
    __syncthreads();
    return smem.threshold;
}

// The lowest key that is selected, of all; for ranks that bins cannot tell apart.
template <int kThreads, class KeyOf>
__device__ unsigned long long bisect(const Group& group, SelectSmem<kThreads>& smem,
                                     SelectExchange* exchange, unsigned long long mass_total,
                                     const End& end, int count, KeyOf&& key_of) {
    unsigned long long low = 1, high = ~0ull;
#pragma unroll 1
    for (int step = 0; step < kBisections && low < high; ++step) {
        const unsigned long long middle = low + (high - low) / 2;
        uint32_t larger = 0;
        unsigned long long mass = 0;
        for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
            const unsigned long long key = key_of(i);
            if (key <= middle) continue;
            ++larger;
            if (end.by_mass) mass += mass_of(rank_of(key));
        }
        larger = block_sum(smem, larger);
        if (end.by_mass) mass = block_sum(smem, mass);
        if (group.size > 1) {
            if (threadIdx.x == 0) atomicAdd(&exchange->bisect_count[step], larger);
            group.sync();
            larger = __ldcg(&exchange->bisect_count[step]);
        }
        if (end.allows(larger, mass, mass_total))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// Selects the largest items. key_of(i), i < count, is 0 for what is no item. No rank is above
// `top`. Masses are for a group of one; `exchange` is not used then.
template <int kThreads, class KeyOf>
__device__ Selection select_largest(const Group& group, SelectSmem<kThreads>& smem,
                                    SelectExchange* exchange, int count, float top, const End& end,
                                    KeyOf&& key_of) {
    RankBins bins{top, 0.0f, 0.0f, -1};
    LastBin last = {};
#pragma unroll 1
    for (int level = 0; level < 2; ++level) {
        count_ranks(group, smem, exchange, bins, count, end.by_mass, key_of);
        last = find_last_bin(smem, last, level == 1, end);
        if (level == 1 || last.bin == kRankBins || last.inside <= kMaxTies) break;
        bins.divide(last.bin);
    }
    const bool divided = bins.only >= 0;
    const bool ordered = last.bin < kRankBins && last.inside <= kMaxTies;
    Selection selection = {1, 0, 0};  // everything
    if (!end.allows(0, 0, end.by_mass ? last.mass_total : 1)) selection.threshold = ~0ull;
    if (last.bin < kRankBins && !ordered)
        selection.threshold = bisect(group, smem, exchange, last.mass_total, end, count, key_of);
    if (ordered) {
        for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
            const unsigned long long key = key_of(i);
            if (key == 0) continue;
            const float rank = rank_of(key);
            const int coarse = bins.coarse(rank);
            if (divided ? coarse != bins.only || bins.fine(rank) != last.bin : coarse != last.bin)
                continue;
            if (group.size == 1)
                smem.ties[atomicAdd(&smem.tie_count, 1u)] = key;
            else
                exchange->ties[atomicAdd(&exchange->tie_count, 1u)] = key;
        }
        group.sync();
        if (group.size > 1) {
            for (uint32_t i = threadIdx.x; i < last.inside; i += kThreads)
                smem.ties[i] = __ldcg(&exchange->ties[i]);
            __syncthreads();
        }
        selection.threshold = order_ties(smem, last, end);
    }
    uint32_t mine = 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const unsigned long long key = key_of(i);
        mine += key != 0 && key >= selection.threshold;
    }
    selection.count = block_sum(smem, mine);
    if (group.size == 1) return selection;
    if (threadIdx.x == 0) exchange->larger[group.rank()] = selection.count;
    group.sync();
    selection.count = 0;
    for (int r = 0; r < group.size; ++r) {
        const uint32_t theirs = __ldcg(&exchange->larger[r]);
        selection.count += theirs;
        if (r < group.rank()) selection.before += theirs;
    }
    return selection;
}

// No rank is above it.
__device__ __forceinline__ float top_rank(const float* selectable, const float* normaliser,
                                          int group) {
    float top = -INFINITY;
    for (int h = 0; h < group; ++h) top = fmaxf(top, selectable[h] - normaliser[h]);
    return fminf(top, 0.0f);
}

}  // namespace condensate::kernels::decode
