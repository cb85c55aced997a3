// One query of one KV head at a time: a group of CTAs scans the summaries, takes a shortlist,
// scores its keys, takes the tokens, and attends them with the rest condensed.
#pragma once

#include "kernels/decode/selected/attend.h"
#include "kernels/decode/selected/score.h"
#include "kernels/decode/selected/select.h"

namespace condensate::kernels::decode {

template <class T_, class CacheT_, int kDim_, int kHeadTiles_>
struct Config {
    using T = T_;
    using CacheT = CacheT_;
    static constexpr int kDim = kDim_;
    static constexpr int kHeadTiles = kHeadTiles_;  // of 8 query heads
};

// Which query, and what it sees. The same in all CTAs of a group.
struct Item {
    int64_t sequence, kv_head, query;
    DecodeSpan span;
    bool dense;                                   // every key is attended
    int32_t units_per_cta, first_unit, end_unit;  // of this CTA

    __device__ Item(const DecodeParams& params, int64_t item, int rank, int pool,
                    uint32_t* error_word) {
        query = item % params.query_len;
        kv_head = item / params.query_len % params.kv_heads;
        sequence = item / params.query_len / params.kv_heads;
        const int64_t told = params.cache.lengths[sequence];
        const int64_t length = max_i64(min_i64(told, params.cache.capacity()), 0);
        if (told != length && rank == 0 && threadIdx.x == 0)
            atomicOr(error_word, kErrorCacheLength);
        span = decode_span(length - params.query_len + query, params.window, params.anchors, pool);
        dense =
            params.mode == DecodeMode::kSelectAndAttend && attends_densely(span, params.shortlist);
        units_per_cta = static_cast<int32_t>(ceil_div(ceil_div(span.units, kGroupCtas), 16) * 16);
        first_unit = min(rank * units_per_cta, span.units);
        end_unit = min(first_unit + units_per_cta, span.units);
    }
    __device__ int32_t candidates_of_unit(int32_t unit) const {
        return min((unit + 1) * kUnitKeys, span.recent_begin) -
               max(unit * kUnitKeys, span.anchors_end);
    }
};

__device__ __forceinline__ unsigned long long unit_key(const SmemArrays& smem, const Item& item,
                                                       int group, int i) {
    const int32_t unit = item.first_unit + i;
    if (unit < item.span.first_unit() || unit >= item.span.end_unit()) return 0;
    float rank = -INFINITY;
    for (int h = 0; h < group; ++h)
        rank = fmaxf(rank, smem.unit_scores[i * group + h] - smem.fixed->normaliser[h]);
    return order_key(rank, static_cast<uint32_t>(unit));
}
__device__ __forceinline__ unsigned long long token_key(const SmemArrays& smem, const Item& item,
                                                        int group, int slot) {
    const int32_t token = smem.slot_key[slot];
    if (token < 0 || !item.span.is_candidate(token)) return 0;
    float rank = -INFINITY;
    for (int h = 0; h < group; ++h)
        rank = fmaxf(rank, smem.key_scores[slot * group + h] - smem.fixed->normaliser[h]);
    return order_key(rank, static_cast<uint32_t>(token));
}

// Slots are runs of 8 keys: anchors, then the shortlist (all candidates where attention is dense,
// the caller's tokens where they are given), then recent keys; a fixed share for each CTA.
struct SlotRuns {
    int32_t anchor_runs, listed_runs, recent_first, total, begin, end;

    __device__ SlotRuns(const DecodeSpan& span, int32_t listed, int rank) {
        anchor_runs = (span.anchors_end + kUnitKeys - 1) / kUnitKeys;
        listed_runs = listed;
        recent_first = span.recent_begin / kUnitKeys;
        total = anchor_runs + listed + (span.visible + kUnitKeys - 1) / kUnitKeys - recent_first;
        const int32_t each = (total + kGroupCtas - 1) / kGroupCtas;
        begin = min(rank * each, total);
        end = min(begin + each, total);
    }
    __device__ int slots() const { return (end - begin) * kUnitKeys; }
    // The first listed place of this CTA.
    __device__ int first_listed() const {
        return max(min(begin - anchor_runs, listed_runs), 0) * kUnitKeys;
    }
    // No candidate of a lower CTA is as high, no candidate of this one lower.
    __device__ uint32_t first_index(const int32_t* shortlist) const {
        const int place = first_listed() / kUnitKeys;
        if (begin - anchor_runs >= listed_runs || place >= listed_runs) return 0xffffffffu;
        return static_cast<uint32_t>(__ldcg(&shortlist[place])) * kUnitKeys;
    }
    // Does slot `i` of this CTA hold what is listed?
    __device__ bool is_listed(int i) const {
        const int32_t run = begin + i / kUnitKeys - anchor_runs;
        return run >= 0 && run < listed_runs;
    }
};

// listed_key(i): key of the i-th listed place, or -1.
template <class ListedKey>
__device__ void fill_slots(const SmemArrays& smem, const DecodeSpan& span, const SlotRuns& runs,
                           ListedKey&& listed_key) {
    for (int i = static_cast<int>(threadIdx.x); i < runs.slots(); i += kThreads) {
        const int32_t run = runs.begin + i / kUnitKeys, within = i % kUnitKeys;
        int32_t key;
        if (run < runs.anchor_runs) {
            key = run * kUnitKeys + within;
            if (key >= span.anchors_end) key = -1;
        } else if (run < runs.anchor_runs + runs.listed_runs) {
            key = listed_key((run - runs.anchor_runs) * kUnitKeys + within);
            if (key >= 0 && !span.is_candidate(key)) key = -1;
        } else {
            key = (run - runs.anchor_runs - runs.listed_runs + runs.recent_first) * kUnitKeys +
                  within;
            if (key < span.recent_begin || key >= span.visible) key = -1;
        }
        smem.slot_key[i] = key;
    }
    __syncthreads();
}

// The caller's list: entries that are out of range or not above the valid ones before them do not
// exist.
struct GivenTokens {
    const int32_t* tokens = nullptr;
    int32_t visible = 0;
    int32_t count = 0, begin = 0;  // of the list, and where this CTA's share of it begins
    int32_t largest = -1;          // of the entries before `begin`

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
    __device__ void start_at(Smem& smem, int first) {
        begin = first;
        int32_t before = -1;
        for (int i = static_cast<int>(threadIdx.x); i < begin; i += kThreads)
            before = max(before, in_range(i));
        before = __reduce_max_sync(0xffffffffu, before);
        __syncthreads();
        if (threadIdx.x % 32 == 0)
            smem.warp_counts[threadIdx.x / 32] = static_cast<uint32_t>(before + 1);
        __syncthreads();
        largest = -1;
        for (int w = 0; w < kWarps; ++w)
            largest = max(largest, static_cast<int32_t>(smem.warp_counts[w]) - 1);
        __syncthreads();
    }
    __device__ int32_t key(int i, uint32_t* error_word) const {
        if (i >= count) return -1;
        int32_t before = largest;
        for (int other = begin; other < i; ++other) before = max(before, in_range(other));
        const int32_t token = in_range(i);
        if (token > before) return token;
        atomicOr(error_word, kErrorTokenIndex);
        return -1;
    }
};

// Keys of a unit that are not attended weigh by the mean of their scores. Their mass is larger, by
// Jensen's inequality; the estimate of what is omitted wants the mass.
struct FarTerm {
    float keys, sum, mass;

    __device__ void add(float score, float reference) {
        if (score == -INFINITY) return;
        keys += 1.0f;
        sum += score;
        mass += ptx::exp2_approx(score - reference);
    }
    __device__ float weight(float reference) const {
        return keys > 0.0f ? keys * ptx::exp2_approx(sum / keys - reference) : 0.0f;
    }
};
// A unit that was not looked into has the mean of its scores alone.
__device__ __forceinline__ float unit_weight(float score, int32_t keys, float reference) {
    return keys > 0 ? static_cast<float>(keys) * ptx::exp2_approx(score - reference) : 0.0f;
}

// Tells the group this CTA's sums of heads [head, head + 4); a thread has those of its own head.
__device__ inline void tell_sums(Smem& smem, Exchange& exchange, RowSums sums, int rank, int head,
                                 bool exists) {
    const int h = static_cast<int>(threadIdx.x) % kHeadsAtOnce;
#pragma unroll
    for (int offset = kHeadsAtOnce; offset < 32; offset *= 2) {
        sums.attended += __shfl_xor_sync(0xffffffffu, sums.attended, offset);
        sums.condensed += __shfl_xor_sync(0xffffffffu, sums.condensed, offset);
        sums.omitted += __shfl_xor_sync(0xffffffffu, sums.omitted, offset);
    }
    if (threadIdx.x % 32 < kHeadsAtOnce) smem.warp_rows[threadIdx.x / 32][h] = sums;
    __syncthreads();
    if (threadIdx.x < kHeadsAtOnce && exists) {
        RowSums total = {};
        for (int w = 0; w < kWarps; ++w) {
            total.attended += smem.warp_rows[w][h].attended;
            total.condensed += smem.warp_rows[w][h].condensed;
            total.omitted += smem.warp_rows[w][h].omitted;
        }
        exchange.rows[rank][head + h] = total;
    }
    __syncthreads();
}

// Weighted sums of this CTA: attended values, and pools for what is not attended.
template <class Config>
__device__ __noinline__ void attend(const SmemArrays& smem,
                                    const CacheView<typename Config::CacheT>& cache,
                                    const DecodeParams& params, const Item& item,
                                    const SlotRuns& runs, Exchange& exchange, float* partial,
                                    int rank, bool selects, unsigned long long threshold) {
    const int group = params.group(), slots = runs.slots();
    Smem& fixed = *smem.fixed;
    // An unlisted candidate keeps its key, as -2 - key.
    const int listed = static_cast<int>(compact(
        fixed, slots,
        [&](int i) {
            const int32_t token = smem.slot_key[i];
            if (token < 0) return false;
            if (!selects || !item.span.is_candidate(token)) return true;
            if (token_key(smem, item, group, i) >= threshold) return true;
            smem.slot_key[i] = -2 - token;
            return false;
        },
        [&](int i, uint32_t place) { smem.listed[place] = i; }));
    const float value_scale =
        params.cache.value_scale ? params.cache.value_scale[item.kv_head] : 1.0f;
    const int units_per_pool = (1 << cache.pool_shift) / kUnitKeys;
    const int units = item.end_unit - item.first_unit;
    const int pools = selects ? (units + units_per_pool - 1) / units_per_pool : 0;
    const int entries = selects ? pools + slots / kUnitKeys : 0;
    for (int head = 0; head < group; head += kHeadsAtOnce) {
        HeadAccumulators acc = {};
        accumulate_values<typename Config::T, Config::kDim>(acc, smem, cache, group, head,
                                                            value_scale, listed);
        const int h = static_cast<int>(threadIdx.x) % kHeadsAtOnce;
        const bool exists = head + h < group;
        const float reference = exists ? fixed.reference[head + h] : 0.0f;
        RowSums sums = {};
        for (int i = static_cast<int>(threadIdx.x) / kHeadsAtOnce; i < listed && exists;
             i += kThreads / kHeadsAtOnce)
            sums.attended +=
                ptx::exp2_approx(smem.key_scores[smem.listed[i] * group + head + h] - reference);
        for (int first = 0; first < entries; first += kFarTile) {
            const int e = static_cast<int>(threadIdx.x) / kHeadsAtOnce, entry = first + e;
            float weight = 0.0f;
            int32_t token = -1;
            if (entry < pools) {
                const int begin = entry * units_per_pool;
                token = (item.first_unit + begin) * kUnitKeys;
                for (int u = begin; u < min(begin + units_per_pool, units) && exists; ++u)
                    weight += unit_weight(smem.unit_scores[u * group + head + h],
                                          item.candidates_of_unit(item.first_unit + u), reference);
                sums.omitted += weight;
            } else if (entry < entries && runs.is_listed((entry - pools) * kUnitKeys)) {
                FarTerm term = {};
                for (int i = (entry - pools) * kUnitKeys, end = i + kUnitKeys; i < end; ++i) {
                    if (smem.slot_key[i] > -2) continue;
                    token = -2 - smem.slot_key[i];
                    if (exists) term.add(smem.key_scores[i * group + head + h], reference);
                }
                weight = term.weight(reference);
                sums.omitted += term.mass;
            }
            sums.condensed += weight;
            fixed.far_weight[e][h] = weight;
            if (h == 0) fixed.far_token[e] = token;
            __syncthreads();
            if (params.far_field)
                accumulate_pools<Config::kDim>(acc, fixed, cache, min(entries - first, kFarTile));
            __syncthreads();
        }
        store_partial<Config::kDim>(acc, smem.accumulators, partial, group, head);
        tell_sums(fixed, exchange, sums, rank, head, exists);
    }
}

// The group's partial sums, over their softmax's denominator, to the output. Each CTA writes a
// share of the elements.
template <class Config>
__device__ void combine(Smem& smem, const DecodeParams& params, const Item& item,
                        const Exchange& exchange, const float* partials, int rank) {
    using T = typename Config::T;
    const int group = params.group(), elements = group * Config::kDim;
    const int head = static_cast<int>(threadIdx.x);
    if (head < group) {
        RowSums sums = {};
        for (int r = 0; r < kGroupCtas; ++r) {
            sums.attended += __ldcg(&exchange.rows[r][head].attended);
            sums.condensed += __ldcg(&exchange.rows[r][head].condensed);
            sums.omitted += __ldcg(&exchange.rows[r][head].omitted);
        }
        const int64_t query_head = item.kv_head * group + head;
        float total = sums.attended + (params.far_field ? sums.condensed : 0.0f);
        if (params.sinks)
            total +=
                ptx::exp2_approx(params.sinks[query_head] * device::kLog2E - smem.reference[head]);
        smem.normaliser[head] = total;
        const int64_t row =
            (item.sequence * params.query_heads + query_head) * params.query_len + item.query;
        if (rank == 0 && params.lse)
            params.lse[row] = (smem.reference[head] + log2f(total)) / device::kLog2E;
        if (rank == 0 && params.omitted_mass_estimate)
            params.omitted_mass_estimate[row] =
                sums.omitted > 0.0f ? sums.omitted / (sums.attended + sums.omitted) : 0.0f;
    }
    __syncthreads();
    T* out = static_cast<T*>(params.out) + item.sequence * params.out_stride_batch +
             item.kv_head * group * params.out_stride_head + item.query * params.out_stride_seq;
    const int each = (elements + kGroupCtas - 1) / kGroupCtas;
    const int end = min((rank + 1) * each, elements);
    for (int i = rank * each + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kGroupCtas; ++r) sum += __ldcg(&partials[r * elements + i]);
        const float total = smem.normaliser[i / Config::kDim];
        out[i / Config::kDim * params.out_stride_head + i % Config::kDim] =
            from_float<T>(total == 0.0f ? 0.0f : sum / total);
    }
}

// Sets what ranks are taken against, and weights: per head, from the sums that the group told.
__device__ inline void set_normalisers(Smem& smem,
                                       const ScoreSums (&told)[kGroupCtas][kMaxDecodeGroup],
                                       int group, float log2_of_each, const float* sinks) {
    const int head = static_cast<int>(threadIdx.x);
    if (head < group) {
        const ScoreSums total = total_of(told, head);
        smem.normaliser[head] =
            total.sum > 0.0f ? total.largest + log2f(total.sum) + log2_of_each : 0.0f;
        smem.candidate_max[head] = total.selectable;
        float reference = fmaxf(smem.reference[head], total.largest);
        if (sinks) reference = fmaxf(reference, sinks[head] * device::kLog2E);
        smem.reference[head] = reference;
    }
    __syncthreads();
}

// No rank is above it: candidates' largest scores against what ranks are taken against.
__device__ __forceinline__ float top_rank(const Smem& smem, int group) {
    float top = -INFINITY;
    for (int h = 0; h < group; ++h) top = fmaxf(top, smem.candidate_max[h] - smem.normaliser[h]);
    return fminf(top, 0.0f);
}

__device__ inline void clear(Exchange& exchange, int rank) {
    constexpr int kWords = offsetof(SelectExchange, ties) / 4;
    auto* units = reinterpret_cast<uint32_t*>(&exchange.units);
    auto* tokens = reinterpret_cast<uint32_t*>(&exchange.tokens);
    for (int i = rank * kThreads + static_cast<int>(threadIdx.x); i < kWords;
         i += kGroupCtas * kThreads) {
        units[i] = 0;
        tokens[i] = 0;
    }
}

// The lists alone: this CTA's tokens in their places, and the padding.
__device__ inline void store_list(const SmemArrays& smem, const DecodeParams& params,
                                  const Item& item, int slots, const Selection& selection,
                                  int64_t list, int rank) {
    int32_t* tokens = params.token_indices + list * params.topk;
    compact(
        *smem.fixed, slots,
        [&](int i) {
            const unsigned long long key = token_key(smem, item, params.group(), i);
            return key != 0 && key >= selection.threshold;
        },
        [&](int i, uint32_t place) { tokens[selection.before + place] = smem.slot_key[i]; });
    if (rank != 0) return;
    for (int64_t i = selection.count + threadIdx.x; i < params.topk; i += kThreads) tokens[i] = -1;
    if (threadIdx.x == 0) params.token_counts[list] = static_cast<int32_t>(selection.count);
}

// The units to score, in ascending order, to `shortlist`; returns how many there are.
template <class Config>
__device__ int32_t make_shortlist(Group& group, const SmemArrays& smem,
                                  const CacheView<typename Config::CacheT>& cache,
                                  const DecodeParams& params, const Item& item, Exchange& exchange,
                                  int32_t* shortlist, int rank, uint32_t* error_word) {
    const int heads = params.group(), units = item.end_unit - item.first_unit;
    scan_units<Config::kDim, Config::kHeadTiles>(smem, cache, params, item.first_unit,
                                                 item.end_unit, error_word);
    tell_sums(*smem.fixed, smem.unit_scores, units, heads, exchange.scan[rank], [&](int i) {
        const int32_t unit = item.first_unit + i;
        return unit >= item.span.first_unit() && unit < item.span.end_unit();
    });
    group.sync();
    set_normalisers(*smem.fixed, exchange.scan, heads, 3.0f, nullptr);  // 8 keys a unit
    const Selection selection = select_largest(
        group, *smem.fixed, exchange.units, units, static_cast<uint32_t>(item.first_unit),
        top_rank(*smem.fixed, heads), static_cast<uint32_t>(params.shortlist / kUnitKeys), 0.0f,
        [&](int i) { return unit_key(smem, item, heads, i); });
    compact(
        *smem.fixed, units,
        [&](int i) {
            const unsigned long long key = unit_key(smem, item, heads, i);
            return key != 0 && key >= selection.threshold;
        },
        [&](int i, uint32_t place) {
            shortlist[selection.before + place] = item.first_unit + i;
            // Its keys are scored one by one: as a unit it weighs nothing.
            for (int h = 0; h < heads; ++h) smem.unit_scores[i * heads + h] = -INFINITY;
        });
    group.sync();
    return static_cast<int32_t>(selection.count);
}

// A phase's view of shared memory and of the cache, made anew for each: none of it lives in
// registers while others run.
template <class Config>
struct Phase {
    const DecodeParams& params;
    const Sizes& sizes;
    uint8_t* smem_bytes;
    uint8_t* slab;

    __device__ SmemArrays smem() const {
        return SmemArrays(smem_bytes + recomputed(0), sizes, slab, Group::rank());
    }
    __device__ CacheView<typename Config::CacheT> cache(const Item& item) const {
        return CacheView<typename Config::CacheT>(params.cache, params.summaries,
                                                  recomputed(static_cast<int32_t>(item.sequence)),
                                                  recomputed(static_cast<int32_t>(item.kv_head)));
    }
};

template <class Config>
__global__ void __launch_bounds__(kThreads, 2)
    decode_selected_kernel(const __grid_constant__ DecodeParams params,
                           const __grid_constant__ Sizes sizes, uint8_t* workspace,
                           uint32_t* counters, uint32_t* error_word) {
    using T = typename Config::T;
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    Group group(counters ? counters + Group::index() : nullptr);
    const int rank = Group::rank(), heads = params.group();
    uint8_t* slab = workspace + Group::index() * sizes.workspace_bytes();
    auto& exchange = *reinterpret_cast<Exchange*>(slab);
    auto* partials = reinterpret_cast<float*>(slab + sizes.partial_offset());
    auto* shortlist = reinterpret_cast<int32_t*>(slab + sizes.shortlist_offset());
    Smem& fixed = *reinterpret_cast<Smem*>(smem_bytes);
    const Phase<Config> phase{params, sizes, smem_bytes, slab};

    const int64_t items = params.batch * params.kv_heads * params.query_len;
    for (int64_t index = Group::index(); index < items; index += Group::count()) {
        const int pool = pool_keys(params.cache.page_size, params.cache.block_table != nullptr);
        const Item item(params, index, rank, pool, error_word);
        const bool given = params.mode == DecodeMode::kGivenTokens;
        const bool selects = !given && !item.dense;
        __syncthreads();  // the last item's shared memory is done with
        load_query<T, Config::kDim>(phase.smem(), params, item.sequence, item.kv_head, item.query);
        if (static_cast<int>(threadIdx.x) < heads) fixed.reference[threadIdx.x] = -INFINITY;
        clear(exchange, rank);
        __syncthreads();

        int32_t listed_runs =
            item.span.candidates() > 0 ? item.span.end_unit() - item.span.first_unit() : 0;
        if (selects)
            listed_runs = make_shortlist<Config>(group, phase.smem(), phase.cache(item), params,
                                                 item, exchange, shortlist, rank, error_word);
        GivenTokens tokens;
        if (given) {
            tokens.read(params, item, index, error_word);
            listed_runs = (tokens.count + kUnitKeys - 1) / kUnitKeys;
        }
        const SlotRuns runs(item.span, listed_runs, rank);
        if (given) tokens.start_at(fixed, runs.first_listed());
        fill_slots(phase.smem(), item.span, runs, [&](int i) {
            if (given) return tokens.key(i, error_word);
            const int32_t unit = selects ? __ldcg(&shortlist[i / kUnitKeys])
                                         : item.span.first_unit() + i / kUnitKeys;
            return unit * kUnitKeys + i % kUnitKeys;
        });
        score_slots<T, Config::kDim, Config::kHeadTiles>(phase.smem(), phase.cache(item), params,
                                                         item.kv_head, exchange, rank, runs.slots(),
                                                         error_word);
        group.sync();
        set_normalisers(fixed, exchange.keys, heads, 0.0f,
                        params.sinks ? params.sinks + item.kv_head * heads : nullptr);

        Selection selection = {0, 0, 0};
        if (selects) {
            const SmemArrays smem = phase.smem();
            selection = select_largest(
                group, fixed, exchange.tokens, runs.slots(), runs.first_index(shortlist),
                top_rank(fixed, heads), static_cast<uint32_t>(min_i64(params.topk, INT32_MAX)),
                params.top_p, [&](int i) { return token_key(smem, item, heads, i); });
        }
        if (params.mode == DecodeMode::kSelect) {
            store_list(phase.smem(), params, item, runs.slots(), selection, index, rank);
            group.sync();  // the exchange is done with
            continue;
        }
        attend<Config>(phase.smem(), phase.cache(item), params, item, runs, exchange,
                       partials + rank * heads * Config::kDim, rank, selects, selection.threshold);
        group.sync();
        combine<Config>(fixed, params, item, exchange, partials, rank);
    }
}

}  // namespace condensate::kernels::decode
