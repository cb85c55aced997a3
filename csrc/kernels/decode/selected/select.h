// The largest of many items that the CTAs of a group hold: exact, in a total order (rank, then the
// lower index), with two meetings of the group. A histogram over ranks finds the bin where the
// selection ends; the items of that bin are gathered and ordered. Where they are too many (equal
// ranks everywhere), the end is bisected instead.
#pragma once

#include "kernels/decode/selected/exchange.h"

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

__device__ __forceinline__ uint32_t block_sum(Smem& smem, uint32_t value) {
    value = __reduce_add_sync(0xffffffffu, value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) smem.warp_counts[threadIdx.x / 32] = value;
    __syncthreads();
    uint32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += smem.warp_counts[w];
    return sum;
}
__device__ __forceinline__ unsigned long long block_sum(Smem& smem, unsigned long long value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) smem.warp_masses[threadIdx.x / 32] = value;
    __syncthreads();
    unsigned long long sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += smem.warp_masses[w];
    return sum;
}

// Calls emit(i, place) for every i in [0, count) with flag(i), places counting from 0 in order.
// Returns how many there were.
template <class Flag, class Emit>
__device__ uint32_t compact(Smem& smem, int count, Flag&& flag, Emit&& emit) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t done = 0;
    for (int begin = 0; begin < count; begin += kThreads) {
        const int i = begin + static_cast<int>(threadIdx.x);
        const bool set = i < count && flag(i);
        const uint32_t ballot = __ballot_sync(0xffffffffu, set);
        __syncthreads();
        if (lane == 0) smem.warp_counts[warp] = static_cast<uint32_t>(__popc(ballot));
        __syncthreads();
        uint32_t before = done;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            before += w < warp ? smem.warp_counts[w] : 0u;
            done += smem.warp_counts[w];
        }
        if (set) emit(i, before + static_cast<uint32_t>(__popc(ballot & ((1u << lane) - 1u))));
    }
    __syncthreads();
    return done;
}

// Where the selection ends among the bins.
struct LastBin {
    int bin;                        // kRankBins: every item is selected
    uint32_t above;                 // items in the bins before it
    uint32_t inside;                // items in it
    uint32_t total;                 // items in all bins
    unsigned long long mass_above;  // with top_p
    unsigned long long mass_total;
};

// The first bin after which at least `most` items are selected, or the others hold no more than
// `rest` of the mass. `before` says what lies above the bins, and how much mass there is in all;
// its count of a bin's items is not read.
__device__ inline LastBin find_last_bin(Smem& smem, const SelectExchange& exchange, int level,
                                        LastBin start, uint32_t most, bool by_mass,
                                        unsigned long long rest) {
    constexpr int kEach = kRankBins / kThreads;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t items[kEach], sum = 0;
    unsigned long long masses[kEach], mass_sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const int bin = static_cast<int>(threadIdx.x) * kEach + e;
        items[e] = __ldcg(&exchange.bins[level][bin]);
        masses[e] = by_mass ? __ldcg(&exchange.bin_mass[level][bin]) : 0ull;
        sum += items[e];
        mass_sum += masses[e];
    }
    uint32_t before = sum;  // inclusive over the warp, then exclusive over the CTA
    unsigned long long mass_before = mass_sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, before, offset);
        const unsigned long long other_mass = __shfl_up_sync(0xffffffffu, mass_before, offset);
        if (lane >= offset) {
            before += other;
            mass_before += other_mass;
        }
    }
    __syncthreads();
    if (lane == 31) {
        smem.warp_counts[warp] = before;
        smem.warp_masses[warp] = mass_before;
    }
    if (threadIdx.x == 0) smem.flags[0] = kRankBins;
    __syncthreads();
    before += start.above - sum;
    mass_before += start.mass_above - mass_sum;
    LastBin last = {kRankBins, 0, 0, 0, 0, start.mass_total};
    unsigned long long mass_inside = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        before += w < warp ? smem.warp_counts[w] : 0u;
        mass_before += w < warp ? smem.warp_masses[w] : 0ull;
        last.total += smem.warp_counts[w];
        mass_inside += smem.warp_masses[w];
    }
    if (level == 0) last.mass_total = mass_inside;
    // Each thread looks at its own bins; the first that ends the selection tells the others.
    bool open = before < most && (!by_mass || last.mass_total - mass_before > rest);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const uint32_t after = before + items[e];
        const unsigned long long mass_after = mass_before + masses[e];
        const bool ends = after >= most || (by_mass && last.mass_total - mass_after <= rest);
        if (open && ends) {
            smem.flags[0] = threadIdx.x * kEach + static_cast<uint32_t>(e);
            smem.flags[1] = before;
            smem.flags[2] = items[e];
            smem.threshold = mass_before;
        }
        open = open && !ends;
        before = after;
        mass_before = mass_after;
    }
    __syncthreads();
    last.bin = static_cast<int>(smem.flags[0]);
    last.above = smem.flags[1];
    last.inside = smem.flags[2];
    last.mass_above = smem.threshold;
    __syncthreads();
    return last;
}

// The lowest key that is selected among those of the last bin, by ordering all of them.
__device__ inline unsigned long long order_ties(Smem& smem, const SelectExchange& exchange,
                                                const LastBin& last, uint32_t most, bool by_mass,
                                                unsigned long long rest) {
    for (uint32_t i = threadIdx.x; i < last.inside; i += kThreads)
        smem.ties[i] = __ldcg(&exchange.ties[i]);
    if (threadIdx.x == 0) smem.threshold = ~0ull;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < last.inside; i += kThreads) {
        const unsigned long long key = smem.ties[i];
        uint32_t larger = last.above;
        unsigned long long mass = last.mass_above;
        for (uint32_t other = 0; other < last.inside; ++other) {
            const bool comes_first = smem.ties[other] > key;
            larger += comes_first;
            if (by_mass && comes_first) mass += mass_of(rank_of(smem.ties[other]));
        }
        if (larger < most && (!by_mass || last.mass_total - mass > rest))
            atomicMin(&smem.threshold, key);
    }
    __syncthreads();
    return smem.threshold;
}

// Adds this CTA's items to the group's bins.
template <class KeyOf>
__device__ void count_ranks(Smem& smem, SelectExchange& exchange, int level, const RankBins& bins,
                            int count, bool by_mass, KeyOf&& key_of) {
    for (int b = static_cast<int>(threadIdx.x); b < kRankBins; b += kThreads) {
        smem.bins[b] = 0;
        if (by_mass) smem.bin_mass[b] = 0;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const unsigned long long key = key_of(i);
        if (key == 0) continue;
        const float rank = rank_of(key);
        const int coarse = bins.coarse(rank);
        if (level == 1 && coarse != bins.only) continue;
        const int bin = level == 0 ? coarse : bins.fine(rank);
        atomicAdd(&smem.bins[bin], 1u);
        if (by_mass) atomicAdd(&smem.bin_mass[bin], mass_of(rank));
    }
    __syncthreads();
    for (int b = static_cast<int>(threadIdx.x); b < kRankBins; b += kThreads) {
        if (smem.bins[b] == 0) continue;
        atomicAdd(&exchange.bins[level][b], smem.bins[b]);
        if (by_mass) atomicAdd(&exchange.bin_mass[level][b], smem.bin_mass[b]);
    }
}

// Selects at most `most` items; with top_p > 0 only as many of the largest as leave no more than
// 1 - top_p of the mass to the others. key_of(i), i < count, is 0 for what is no item. All indices
// of lower CTAs are below `first_index`, this CTA's own are not. No rank is above `top`.
template <class KeyOf>
__device__ __noinline__ Selection select_largest(Group& group, Smem& smem, SelectExchange& exchange,
                                                 int count, uint32_t first_index, float top,
                                                 uint32_t most, float top_p, KeyOf&& key_of) {
    const bool by_mass = top_p > 0.0f;
    const unsigned long long rest =
        by_mass ? static_cast<unsigned long long>((1.0f - fminf(top_p, 1.0f)) * 0x1p30f) : 0ull;
    RankBins bins{top, 0.0f, 0.0f, -1};
    count_ranks(smem, exchange, 0, bins, count, by_mass, key_of);
    group.sync();
    LastBin last = find_last_bin(smem, exchange, 0, LastBin{}, most, by_mass, rest);
    if (last.bin < kRankBins && last.inside > kMaxTies) {
        bins.divide(last.bin);
        count_ranks(smem, exchange, 1, bins, count, by_mass, key_of);
        group.sync();
        last = find_last_bin(smem, exchange, 1, last, most, by_mass, rest);
    }
    const bool ordered = last.bin < kRankBins && last.inside <= kMaxTies;
    const bool bisected = last.bin < kRankBins && !ordered;
    unsigned long long threshold = most == 0 ? ~0ull : 1ull;  // of everything, or nothing
    if (last.bin == kRankBins && last.total > 0 && by_mass && last.mass_total <= rest)
        threshold = ~0ull;
    if (bisected) {  // the least key that is selected
        unsigned long long low = 1, high = ~0ull;
        for (int step = 0; step < kBisections && low < high; ++step) {
            const unsigned long long middle = low + (high - low) / 2;
            uint32_t larger = 0;
            unsigned long long mass = 0;
            for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
                const unsigned long long key = key_of(i);
                if (key <= middle) continue;
                ++larger;
                if (by_mass) mass += mass_of(rank_of(key));
            }
            larger = block_sum(smem, larger);
            if (by_mass) mass = block_sum(smem, mass);
            if (threadIdx.x == 0) {
                atomicAdd(&exchange.bisect_count[step], larger);
                if (by_mass) atomicAdd(&exchange.bisect_mass[step], mass);
            }
            group.sync();
            larger = __ldcg(&exchange.bisect_count[step]);
            mass = by_mass ? __ldcg(&exchange.bisect_mass[step]) : 0ull;
            if (larger < most && (!by_mass || last.mass_total - mass > rest))
                high = middle;
            else
                low = middle + 1;
        }
        threshold = low;
    }
    uint32_t mine = 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const unsigned long long key = key_of(i);
        if (key == 0) continue;
        const float rank = rank_of(key);
        const int coarse = bins.coarse(rank);
        const bool undivided = bins.only < 0;
        const int bin = undivided ? coarse : bins.fine(rank);
        const bool above = undivided
                               ? bin < last.bin
                               : coarse < bins.only || (coarse == bins.only && bin < last.bin);
        if (ordered && !above && bin == last.bin && (undivided || coarse == bins.only))
            exchange.ties[atomicAdd(&exchange.tie_count, 1u)] = key;
        mine += ordered ? above : key >= threshold;
    }
    mine = block_sum(smem, mine);
    if (threadIdx.x == 0) exchange.larger[Group::rank()] = mine;
    group.sync();

    Selection selection = {threshold, 0, 0};
    if (ordered) selection.threshold = order_ties(smem, exchange, last, most, by_mass, rest);
    for (int r = 0; r < kGroupCtas; ++r) {
        const uint32_t larger = __ldcg(&exchange.larger[r]);
        selection.count += larger;
        if (r < Group::rank()) selection.before += larger;
    }
    if (ordered) {
        uint32_t lower = 0, all = 0;
        for (uint32_t i = threadIdx.x; i < last.inside; i += kThreads) {
            const bool selected = smem.ties[i] >= selection.threshold;
            all += selected;
            lower += selected && index_of(smem.ties[i]) < first_index;
        }
        selection.count += block_sum(smem, all);
        selection.before += block_sum(smem, lower);
    }
    __syncthreads();
    return selection;
}

}  // namespace condensate::kernels::decode
