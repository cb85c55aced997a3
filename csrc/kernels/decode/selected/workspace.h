// What the five kernels of a step that selects tell each other, in global memory: one record an
// item, which is one query of one KV head.
//
//   decode_scan       a CTA 256 units       unit scores, their sums
//   decode_shortlist  a CTA or cluster an item   the units to look into
//   decode_score      a CTA 256 slots       key scores
//   decode_list       a CTA an item         the keys to attend
//   decode_attend     a CTA 128 rows, or 256 pools   partial sums; the last CTA adds them up
//
// A CTA's share depends on its place in the sequence alone, and sums are added in a fixed order, so
// results do not depend on what else is in the batch.
#pragma once

#include "condensate/decode.h"

namespace condensate::kernels::decode {

constexpr int kMaxDecodeGroup = 16;  // query heads per KV head
constexpr int kChunkUnits = 256;     // that a CTA of the scan scores
constexpr int kSliceSlots = 256;     // keys that a CTA scores
constexpr int kSliceRows = 128;      // values that a CTA adds up
constexpr int kSlicePools = 256;     // mean values that a CTA adds up

// Of one head's scores, log2: the largest, the sum of 2^(score - largest), and the largest of those
// that can be selected.
struct alignas(16) ScoreSums {
    float largest;
    float sum;
    float selectable;
    float unused;
};

struct Header {
    uint32_t attended;                 // slices that are done
    int32_t units;                     // shortlisted
    int32_t rows;                      // listed, anchors and recent keys among them
    float unit_max[kMaxDecodeGroup];   // largest score of a unit
    float reference[kMaxDecodeGroup];  // log2 that weights are taken against
    float unlisted[kMaxDecodeGroup];   // mass of scored keys that are not attended
};

struct Row {  // a key that is attended
    int32_t token;
    int32_t slot;
};

CONDENSATE_HOST_DEVICE int64_t aligned(int64_t bytes) { return ceil_div(bytes, 128) * 128; }

// Sizes of the workspace, and where an item's arrays lie in its record; the host fills them in.
struct Sizes {
    int32_t group = 0;  // query heads per KV head
    int32_t head_dim = 0;
    int32_t chunks = 0;       // of a sequence's units, by the cache's capacity
    int32_t slots = 0;        // keys that are scored exactly, at most
    int32_t row_slices = 0;   // at most
    int32_t pool_slices = 0;  // at most
    int64_t record_bytes = 0;
    int64_t unit_scores = 0, chunk_sums = 0, shortlist = 0, key_scores = 0, slot_keys = 0;
    int64_t slot_sums = 0, rows = 0, weight_sums = 0, partial = 0;  // bytes

    CONDENSATE_HOST_DEVICE int32_t units() const { return chunks * kChunkUnits; }
    CONDENSATE_HOST_DEVICE int32_t slot_slices() const {
        return (slots + kSliceSlots - 1) / kSliceSlots;
    }
    CONDENSATE_HOST_DEVICE int32_t slices() const { return row_slices + pool_slices; }

    void lay_out() {
        record_bytes = 0;
        auto take = [&](int64_t count, int64_t bytes) {
            const int64_t at = record_bytes;
            record_bytes += aligned(count * bytes);
            return at;
        };
        const int64_t heads = group;
        take(1, sizeof(Header));
        unit_scores = take(units() * heads, sizeof(float));
        chunk_sums = take(chunks * heads, sizeof(ScoreSums));
        shortlist = take(slots / kUnitKeys, sizeof(int32_t));
        key_scores = take(slots * heads, sizeof(float));
        slot_keys = take(slots, sizeof(int32_t));
        slot_sums = take(slot_slices() * heads, sizeof(ScoreSums));
        rows = take(slots, sizeof(Row));
        weight_sums = take(slices() * heads, sizeof(float));
        partial = take(slices() * heads * head_dim, sizeof(float));
    }
};

// An item's arrays.
struct Record {
    uint8_t* base;
    Header* header;
    float* unit_scores;     // [units][G], log2; -inf for shortlisted ones
    ScoreSums* chunk_sums;  // [G][chunks]
    int32_t* shortlist;     // [slots / 8] units, ascending
    float* key_scores;      // [slots][G], log2
    int32_t* slot_keys;     // [slots], -1 where there is no key
    ScoreSums* slot_sums;   // [slot slices][G]
    Row* rows;              // [slots]
    float* weight_sums;     // [slices][G]
    float* partial;         // [slices][G][D]

    __device__ Record(uint8_t* workspace, const Sizes& s, int64_t item)
        : base(workspace + item * s.record_bytes),
          header(reinterpret_cast<Header*>(base)),
          unit_scores(reinterpret_cast<float*>(base + s.unit_scores)),
          chunk_sums(reinterpret_cast<ScoreSums*>(base + s.chunk_sums)),
          shortlist(reinterpret_cast<int32_t*>(base + s.shortlist)),
          key_scores(reinterpret_cast<float*>(base + s.key_scores)),
          slot_keys(reinterpret_cast<int32_t*>(base + s.slot_keys)),
          slot_sums(reinterpret_cast<ScoreSums*>(base + s.slot_sums)),
          rows(reinterpret_cast<Row*>(base + s.rows)),
          weight_sums(reinterpret_cast<float*>(base + s.weight_sums)),
          partial(reinterpret_cast<float*>(base + s.partial)) {}
};

// Counts a CTA in; true in the last of `ctas`, which then sees what all of them wrote.
__device__ __forceinline__ bool is_last_cta(uint32_t* counter, uint32_t ctas, uint32_t* smem_flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *smem_flag = atomicAdd(counter, 1u) == ctas - 1;
        __threadfence();
    }
    __syncthreads();
    return *smem_flag != 0;
}

// Which query an item is, and what it sees.
struct Item {
    int32_t sequence, kv_head, query, pool;
    int32_t length;
    DecodeSpan span;
    bool selects;  // otherwise every key, or every key of the caller's list, is attended

    __device__ Item(const DecodeParams& params, int64_t item, uint32_t* error_word) {
        const auto index = static_cast<uint32_t>(item);
        const auto queries = static_cast<uint32_t>(params.query_len);
        const auto heads = static_cast<uint32_t>(params.kv_heads);
        query = static_cast<int32_t>(index % queries);
        kv_head = static_cast<int32_t>(index / queries % heads);
        sequence = static_cast<int32_t>(index / queries / heads);
        const int64_t told = params.cache.lengths[sequence];
        length = static_cast<int32_t>(max_i64(min_i64(told, params.cache.capacity()), 0));
        if (told != length && threadIdx.x == 0) atomicOr(error_word, kErrorCacheLength);
        pool = pool_keys(params.cache.page_size, params.cache.block_table != nullptr);
        span = decode_span(length - params.query_len + query, params.window, params.anchors, pool);
        selects =
            params.mode == DecodeMode::kSelect || (params.mode == DecodeMode::kSelectAndAttend &&
                                                   !attends_densely(span, params.shortlist));
    }
    // Candidates of a unit.
    __device__ int32_t candidates(int32_t unit) const {
        return min((unit + 1) * kUnitKeys, span.recent_begin) -
               max(unit * kUnitKeys, span.anchors_end);
    }
};

// Slots are runs of 8 keys: anchors, then what is listed (the shortlist, all candidates where
// attention is dense, the caller's tokens where they are given), then recent keys.
struct SlotRuns {
    int32_t anchor_runs, listed_runs, recent_first, total;

    __device__ SlotRuns(const DecodeSpan& span, int32_t listed) {
        anchor_runs = (span.anchors_end + kUnitKeys - 1) / kUnitKeys;
        listed_runs = listed;
        recent_first = span.recent_begin / kUnitKeys;
        total = anchor_runs + listed + (span.visible + kUnitKeys - 1) / kUnitKeys - recent_first;
    }
    __device__ int slots() const { return total * kUnitKeys; }

    __device__ bool is_listed(int32_t run) const {
        return run >= anchor_runs && run < anchor_runs + listed_runs;
    }
    // Key of a slot that is not listed, or -1.
    __device__ int32_t range_key(const DecodeSpan& span, int slot) const {
        const int32_t run = slot / kUnitKeys, within = slot % kUnitKeys;
        const bool anchors = run < anchor_runs;
        const int32_t shift = anchors ? 0 : recent_first - anchor_runs - listed_runs;
        const int32_t key = (run + shift) * kUnitKeys + within;
        const int32_t begin = anchors ? 0 : span.recent_begin;
        const int32_t end = anchors ? span.anchors_end : span.visible;
        return run < total && key >= begin && key < end ? key : -1;
    }
    // Key of a slot, or -1, where units are listed: the shortlist, or all that hold candidates.
    __device__ int32_t key(const DecodeSpan& span, int slot, const int32_t* shortlist,
                           bool selects) const {
        const int32_t run = slot / kUnitKeys, place = run - anchor_runs;
        const bool listed = is_listed(run);
        const int32_t unit =
            selects ? __ldcg(shortlist + (listed ? place : 0)) : span.first_unit() + place;
        const int32_t key = unit * kUnitKeys + slot % kUnitKeys;
        return listed ? (span.is_candidate(key) ? key : -1) : range_key(span, slot);
    }
};

}  // namespace condensate::kernels::decode
