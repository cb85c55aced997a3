// The largest of many items that a CTA, or the CTAs of a group, hold: exact, in a total order
// (rank, then the lower index). A histogram over ranks finds the bin where the selection ends; the
// items of that bin are ordered among each other. Where they are many, the bin is divided once
// more; where they still are (equal ranks everywhere), the end is bisected.
#pragma once

#include "kernels/decode/selected/group.h"
#include "kernels/decode/selected/ranks.h"

namespace condensate::kernels::decode {

constexpr int kMaxTies = 256;    // of a bin that are ordered at once; more are divided, or bisected
constexpr int kBisections = 64;  // bits of an order key

struct Selection {
    unsigned long long threshold;  // selected are the items whose key is not below
    uint32_t before;               // selected items of lower CTAs
    uint32_t count;                // of all CTAs
};

template <int kThreads>
struct SelectSmem {
    static constexpr int kWarps = kThreads / 32;
    uint32_t bins[2][kRankBins];             // of this CTA's items, of all ranks and of one bin
    unsigned long long bin_mass[kRankBins];  // fixed point; used with top_p
    unsigned long long own_ties[kMaxTies];   // this CTA's order keys in the last bin
    unsigned long long ties[kMaxTies];       // the group's, where it has more CTAs
    unsigned long long warp_masses[kWarps];
    unsigned long long threshold;
    uint32_t warp_counts[kWarps];
    uint32_t tie_count;        // of own_ties
    uint32_t above;            // this CTA's items above the last bin, or that are selected
    uint32_t step_sum[2];      // of a bisection's steps
    uint32_t tie_selected[2];  // ties that are selected; of them, those of lower CTAs
    uint32_t last[3];          // bin, items above it, items in it
};

// Of counts of the warps, that of lower warps and of all.
struct WarpSums {
    uint32_t before, all;

    template <int kWarps>
    __device__ static WarpSums of(const uint32_t (&counts)[kWarps]) {
        static_assert(kWarps <= 32, "a lane a warp");
        const int warp = static_cast<int>(threadIdx.x) / 32;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const uint32_t count = lane < kWarps ? counts[lane] : 0u;
        return {__reduce_add_sync(0xffffffffu, lane < warp ? count : 0u),
                __reduce_add_sync(0xffffffffu, count)};
    }
};

template <int kThreads>
__device__ __forceinline__ uint32_t block_sum(SelectSmem<kThreads>& smem, uint32_t value) {
    value = __reduce_add_sync(0xffffffffu, value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) smem.warp_counts[threadIdx.x / 32] = value;
    __syncthreads();
    return WarpSums::of(smem.warp_counts).all;
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
// Returns how many there were. A warp looks at consecutive items.
template <int kThreads, class Flag, class Emit>
__device__ uint32_t compact(SelectSmem<kThreads>& smem, int count, Flag&& flag, Emit&& emit) {
    constexpr int kWarps = kThreads / 32;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int steps = (count + 32 * kWarps - 1) / (32 * kWarps);
    const int first = warp * steps * 32 + lane;
    uint32_t kept = 0, mine = 0;  // lane n keeps the flags of step n; of further ones nobody does
    for (int step = 0; step < steps; ++step) {
        const int i = first + 32 * step;
        const uint32_t flags = __ballot_sync(0xffffffffu, i < count && flag(i));
        if (lane == step) kept = flags;
        mine += static_cast<uint32_t>(__popc(flags));
    }
    __syncthreads();
    if (lane == 0) smem.warp_counts[warp] = mine;
    __syncthreads();
    const WarpSums sums = WarpSums::of(smem.warp_counts);
    uint32_t before = sums.before;
    for (int step = 0; step < steps; ++step) {
        const int i = first + 32 * step;
        const uint32_t flags = step < 32 ? __shfl_sync(0xffffffffu, kept, step)
                                         : __ballot_sync(0xffffffffu, i < count && flag(i));
        if (flags >> lane & 1u)
            emit(i, before + static_cast<uint32_t>(__popc(flags & ((1u << lane) - 1u))));
        before += static_cast<uint32_t>(__popc(flags));
    }
    return sums.all;
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

// The bin of the group's bins where the selection ends; `start` says what lies above the first bin.
template <int kThreads>
__device__ LastBin find_last_bin(const Group& group, SelectSmem<kThreads>& smem,
                                 const LastBin& start, bool divided, const End& end) {
    constexpr int kEach = kRankBins / kThreads, kWarps = kThreads / 32;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t items[kEach], sum = 0;
    unsigned long long masses[kEach] = {}, mass_sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const uint32_t& bin = smem.bins[divided][static_cast<int>(threadIdx.x) * kEach + e];
        items[e] = bin;
        if (group.size > 1) {
            items[e] = 0;
#pragma unroll
            for (int r = 0; r < kMaxGroupCtas; ++r)
                if (r < group.size) items[e] += group.peer(bin, r);
        }
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
    }
    if (end.by_mass) {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
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
    before += start.above - sum + WarpSums::of(smem.warp_counts).before;
    unsigned long long total = 0;
    if (end.by_mass) {
        mass_before += start.mass_above - mass_sum;
#pragma unroll 4
        for (int w = 0; w < kWarps; ++w) {
            mass_before += w < warp ? smem.warp_masses[w] : 0ull;
            total += smem.warp_masses[w];
        }
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
    return {static_cast<int>(smem.last[0]), smem.last[1], smem.last[2], smem.threshold, total};
}

// Counts every CTA's items in its bins.
template <int kThreads>
__device__ void count_ranks(const Group& group, SelectSmem<kThreads>& smem, const RankBins& bins,
                            const RankedItems& items, bool by_mass) {
    const bool divided = bins.only >= 0;
    uint32_t* counts = smem.bins[divided];
    for (int b = static_cast<int>(threadIdx.x); b < kRankBins; b += kThreads) {
        counts[b] = 0;
        if (by_mass) smem.bin_mass[b] = 0;
    }
    if (threadIdx.x == 0)
        smem.tie_count = smem.above = smem.tie_selected[0] = smem.tie_selected[1] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < items.count; i += kThreads) {
        const float rank = items.ranks[i];
        if (!RankedItems::is_item(rank)) continue;
        const int coarse = bins.coarse(rank);
        if (divided && coarse != bins.only) continue;
        const int bin = divided ? bins.fine(rank) : coarse;
        atomicAdd(&counts[bin], 1u);
        if (by_mass) atomicAdd(&smem.bin_mass[bin], mass_of(rank));
    }
    group.sync();
}

// The lowest key that is selected among `ties`, the items of the last bin. Counts those that are,
// and those of them whose index is below `first`.
template <int kThreads>
__device__ unsigned long long order_ties(SelectSmem<kThreads>& smem, const unsigned long long* ties,
                                         const LastBin& last, const End& end, uint32_t first) {
    if (threadIdx.x == 0) smem.threshold = ~0ull;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < last.inside; i += kThreads) {
        const unsigned long long key = ties[i];
        uint32_t larger = last.above;
        unsigned long long mass = last.mass_above;
        for (uint32_t other = 0; other < last.inside; ++other) {
            const bool comes_first = ties[other] > key;
            larger += comes_first;
            if (end.by_mass && comes_first) mass += mass_of(rank_of(ties[other]));
        }
        if (!end.allows(larger, mass, last.mass_total)) continue;
        atomicMin(&smem.threshold, key);
        atomicAdd(&smem.tie_selected[0], 1u);
        if (index_of(key) < first) atomicAdd(&smem.tie_selected[1], 1u);
    }
    __syncthreads();
    return smem.threshold;
}

// The lowest key that is selected, of all; for ranks that bins cannot tell apart.
template <int kThreads>
__device__ unsigned long long bisect(const Group& group, SelectSmem<kThreads>& smem,
                                     unsigned long long mass_total, const End& end,
                                     const RankedItems& items) {
    unsigned long long low = 1, high = ~0ull;
#pragma unroll 1
    for (int step = 0; step < kBisections && low < high; ++step) {
        const unsigned long long middle = low + (high - low) / 2;
        uint32_t larger = 0;
        unsigned long long mass = 0;
        for (int i = static_cast<int>(threadIdx.x); i < items.count; i += kThreads) {
            if (!items.reaches(i, middle + 1)) continue;
            ++larger;
            if (end.by_mass) mass += mass_of(items.ranks[i]);
        }
        larger = block_sum(smem, larger);
        if (end.by_mass) mass = block_sum(smem, mass);
        if (group.size > 1) {
            if (threadIdx.x == 0) smem.step_sum[step % 2] = larger;
            group.sync();
            larger = group.sums(smem.step_sum[step % 2]).all;
        }
        if (end.allows(larger, mass, mass_total))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// Where an end is told by comparing keys alone: counts what it selects.
template <int kThreads>
__device__ Selection count_selected(const Group& group, SelectSmem<kThreads>& smem,
                                    const RankedItems& items, unsigned long long threshold) {
    uint32_t mine = 0;
    for (int i = static_cast<int>(threadIdx.x); i < items.count; i += kThreads)
        mine += items.reaches(i, threshold);
    mine = block_sum(smem, mine);
    if (threadIdx.x == 0) smem.above = mine;
    group.sync();
    const GroupSums sums = group.sums(smem.above);
    return {threshold, sums.before, sums.all};
}

// The ties of all CTAs to each, when they have told their own.
template <int kThreads>
__device__ void gather_ties(const Group& group, SelectSmem<kThreads>& smem) {
    const int thread = static_cast<int>(threadIdx.x);
    uint32_t place = threadIdx.x;
    for (int r = 0; r < group.size; ++r) {
        const uint32_t count = group.peer(smem.tie_count, r);
        if (threadIdx.x < count) smem.ties[place] = group.peer(smem.own_ties[thread], r);
        place += count;
    }
    __syncthreads();
}

// Where it ends within a bin of few items: orders them.
template <int kThreads>
__device__ Selection end_among_ties(const Group& group, SelectSmem<kThreads>& smem,
                                    const RankedItems& items, const RankBins& bins,
                                    const LastBin& last, const End& end) {
    static_assert(kThreads >= kMaxTies, "a thread a tie");
    const bool divided = bins.only >= 0;
    uint32_t above = 0;
    for (int i = static_cast<int>(threadIdx.x); i < items.count; i += kThreads) {
        const float rank = items.ranks[i];
        if (!RankedItems::is_item(rank)) continue;
        const int coarse = bins.coarse(rank);
        int bin = coarse;
        if (divided)
            bin = coarse == bins.only ? bins.fine(rank) : coarse < bins.only ? -1 : kRankBins;
        above += bin < last.bin;
        if (bin == last.bin) smem.own_ties[atomicAdd(&smem.tie_count, 1u)] = items.key(i, rank);
    }
    if (group.size > 1) {
        above = __reduce_add_sync(0xffffffffu, above);
        if (threadIdx.x % 32 == 0) atomicAdd(&smem.above, above);
    }
    group.sync();
    if (group.size > 1) gather_ties(group, smem);
    Selection selection = {0, group.sums(smem.above).before, 0};
    selection.threshold =
        order_ties(smem, group.size > 1 ? smem.ties : smem.own_ties, last, end, items.first);
    selection.before += smem.tie_selected[1];
    selection.count = last.above + smem.tie_selected[0];
    return selection;
}

// Selects the largest items. No rank is above `top`. Masses are for a group of one.
template <int kThreads>
__device__ Selection select_largest(const Group& group, SelectSmem<kThreads>& smem,
                                    const RankedItems& items, float top, const End& end) {
    RankBins bins{top, 0.0f, 0.0f, -1};
    LastBin last = {};
#pragma unroll 1
    for (int level = 0; level < 2; ++level) {
        count_ranks(group, smem, bins, items, end.by_mass);
        last = find_last_bin(group, smem, last, level == 1, end);
        if (level == 1 || last.bin == kRankBins || last.inside <= kMaxTies) break;
        bins.divide(last.bin);
    }
    if (last.bin < kRankBins && last.inside <= kMaxTies)
        return end_among_ties(group, smem, items, bins, last, end);
    unsigned long long threshold = 1;  // everything
    if (last.bin < kRankBins)
        threshold = bisect(group, smem, last.mass_total, end, items);
    else if (!end.allows(0, 0, end.by_mass ? last.mass_total : 1))
        threshold = ~0ull;
    return count_selected(group, smem, items, threshold);
}

// No rank is above it.
__device__ __forceinline__ float top_rank(const float* selectable, const float* normaliser,
                                          int group) {
    float top = -INFINITY;
    for (int h = 0; h < group; ++h) top = fmaxf(top, selectable[h] - normaliser[h]);
    return fminf(top, 0.0f);
}

}  // namespace condensate::kernels::decode
