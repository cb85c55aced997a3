// Attention of a few new queries over a cache of keys and values: parameters and index arithmetic.
// docs/decoding.md states the definition in words.
//
// B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, Lq queries (the last Lq positions of
// every sequence), D head_dim, N pages of P tokens, K = topk.
#pragma once

#include <cstdint>

#include "condensate/geometry.h"
#include "condensate/types.h"

namespace condensate {

constexpr int kMaxDecodeQueries = 16;  // of a sequence
constexpr int kUnitKeys = 8;           // keys that a summarised unit stands for
constexpr int kPoolKeys = 64;          // keys of a pool of values, at most; a page has whole pools
constexpr int kSummaryLevels = 127;    // of an 8-bit summary, on either side of 0

// Keys and values of all sequences, in pages. Without a block table sequence b is page b.
struct KvCache {
    DType dtype = DType::kBFloat16;
    const void* key = nullptr;    // [N, Hkv, P, D] by the strides below; D is contiguous
    const void* value = nullptr;  // the same shape
    int64_t key_stride_page = 0, key_stride_head = 0, key_stride_token = 0;        // elements
    int64_t value_stride_page = 0, value_stride_head = 0, value_stride_token = 0;  // elements
    int64_t num_pages = 0;                                                         // N
    int64_t page_size = 0;                 // P; a multiple of 16 where there is a table
    const int32_t* block_table = nullptr;  // [B, max_pages] physical pages, or null
    int64_t max_pages = 1;                 // columns of the table; 1 without
    const int32_t* lengths = nullptr;      // [B] keys of each sequence, queries included
    const float* key_scale = nullptr;      // [Hkv] of an 8-bit cache, or null: 1
    const float* value_scale = nullptr;    // [Hkv] of an 8-bit cache, or null: 1

    // Keys that a sequence can have, at most.
    CONDENSATE_HOST_DEVICE int64_t capacity() const { return max_pages * page_size; }
};

// Keys of a pool of values.
CONDENSATE_HOST_DEVICE int pool_keys(int64_t page_size, bool paged) {
    return paged && page_size < kPoolKeys ? static_cast<int>(page_size) : kPoolKeys;
}

// 8-bit summaries beside the cache, one record a page and KV head: first the mean keys of its
// units, then the mean values of its pools. Element = row entry * scale of the row.
struct KvSummaries {
    int8_t* rows = nullptr;   // [N, Hkv, R, D], the last two dimensions contiguous
    float* scales = nullptr;  // [N, Hkv, R], the last dimension contiguous
    int64_t rows_stride_page = 0, rows_stride_head = 0;      // elements
    int64_t scales_stride_page = 0, scales_stride_head = 0;  // elements
    const float* key_center =
        nullptr;  // [Hkv, D] taken off every key before it is rounded, or null

    CONDENSATE_HOST_DEVICE bool given() const { return rows != nullptr; }
};
CONDENSATE_HOST_DEVICE int64_t unit_rows(int64_t page_size) {
    return ceil_div(page_size, kUnitKeys);
}
CONDENSATE_HOST_DEVICE int64_t record_rows(int64_t page_size, bool paged) {
    return unit_rows(page_size) + ceil_div(page_size, pool_keys(page_size, paged));
}

// cache -> summaries of everything that the last `appended` keys of each sequence touch: whole
// units and pools, an unfinished one over the keys it has.
//
// Every operation is one float32 operation rounded to nearest even, none fused, in this order, so
// that all paths write the same bits:
//     part = 0;  for each key of a unit, ascending:  part = part + element
//     sum = 0;  for each unit of the row, ascending:  sum = sum + its part
//     x = sum / keys of the row;  of an 8-bit cache:  x = x * scale of the cache's head
//     of units where there is a center:  x = x - center
//     m = max |x| over the channels;  inverse = 127 / m
//     entry = rint(x * inverse);  scale of the row = m / 127
// An x that is not finite: entries 0 and scale NaN. Else an inverse that is not (m = 0, or so small
// that 127 / m overflows): entries 0 and scale 0.
struct UpdateSummariesParams {
    int64_t batch = 0;
    int64_t kv_heads = 0;
    int64_t head_dim = 0;
    int64_t appended = 0;  // at least as many as were appended since the last update
    KvCache cache;
    KvSummaries summaries;
};

enum class DecodeMode : int32_t {
    kDense = 0,  // every key
    kSelectAndAttend = 1,
    kSelect = 2,       // the lists alone
    kGivenTokens = 3,  // lists from the caller
};

// query, cache, summaries -> attention over anchors, recent keys and listed tokens, the rest
// condensed.
struct DecodeParams {
    DecodeMode mode = DecodeMode::kSelectAndAttend;
    DType dtype = DType::kBFloat16;  // of query and out
    int64_t batch = 0;
    int64_t query_heads = 0;
    int64_t kv_heads = 0;
    int64_t query_len = 0;
    int64_t head_dim = 0;
    int64_t window = 0;
    int64_t anchors = 0;
    int64_t topk = 0;       // K: tokens of a list, at most
    int64_t shortlist = 0;  // keys that are scored to find them, at most; whole units
    float top_p = 0.0f;     // in (0, 1]: mass that lists must hold; 0: K tokens
    float scale = 1.0f;
    float softcap = 0.0f;  // c > 0: a score s becomes c * tanh(s / c); 0: none
    bool far_field = true;
    ConstTensor4 query;  // [B, Hq, Lq, D]
    KvCache cache;
    KvSummaries summaries;             // for the modes that select
    const float* sinks = nullptr;      // [Hq] logits that join the softmax, or null
    int32_t* token_indices = nullptr;  // [B, Hkv, Lq, K] ascending, -1 padded; read, or
    int32_t* token_counts = nullptr;   // [B, Hkv, Lq]    written where not null
    void* out = nullptr;               // [B, Hq, Lq, D] by the strides below, dtype
    int64_t out_stride_batch = 0, out_stride_head = 0, out_stride_seq = 0;
    float* lse = nullptr;                    // [B, Hq, Lq] natural log, or null
    float* omitted_mass_estimate = nullptr;  // [B, Hq, Lq] or null
    void* workspace = nullptr;               // decode_workspace_bytes(); null where that is 0

    CONDENSATE_HOST_DEVICE int group() const { return static_cast<int>(query_heads / kv_heads); }
};

// One query's view of its sequence: position p sees keys [0, p]. Units and pools that are looked
// at are whole and end at or before p.
struct DecodeSpan {
    int32_t visible;       // keys that the query sees, p + 1
    int32_t anchors_end;   // keys [0, anchors_end) are attended
    int32_t recent_begin;  // and [recent_begin, visible): the window, at least the pool that p cuts
    int32_t units;         // whole units, [0, units)

    // Units that hold candidates, keys in [anchors_end, recent_begin).
    CONDENSATE_HOST_DEVICE int32_t first_unit() const { return anchors_end / kUnitKeys; }
    CONDENSATE_HOST_DEVICE int32_t end_unit() const {
        return (recent_begin + kUnitKeys - 1) / kUnitKeys;
    }
    CONDENSATE_HOST_DEVICE int32_t candidates() const { return recent_begin - anchors_end; }
    CONDENSATE_HOST_DEVICE bool is_candidate(int32_t key) const {
        return key >= anchors_end && key < recent_begin;
    }
};
CONDENSATE_HOST_DEVICE DecodeSpan decode_span(int64_t position, int64_t window, int64_t anchors,
                                              int pool) {
    constexpr int64_t kMost = 0x7fffffff;
    DecodeSpan span = {};
    const int32_t visible = static_cast<int32_t>(max_i64(position + 1, 0));
    const int32_t recent = visible - static_cast<int32_t>(min_i64(window, kMost));
    const int32_t cut = visible & ~(pool - 1);  // pools are a power of two
    span.visible = visible;
    span.recent_begin = recent < 0 ? 0 : recent < cut ? recent : cut;
    const int32_t first = static_cast<int32_t>(min_i64(anchors, kMost));
    span.anchors_end = first < span.recent_begin ? first : span.recent_begin;
    span.units = visible / kUnitKeys;
    return span;
}

// Are all keys attended? A sequence whose candidates fit the shortlist would be scored in full.
CONDENSATE_HOST_DEVICE bool attends_densely(const DecodeSpan& span, int64_t shortlist) {
    return span.candidates() <= shortlist;
}

}  // namespace condensate
