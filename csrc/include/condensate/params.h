// One plain struct of parameters per stage: every pointer with its shape and who may leave it null.
// B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, Lq queries, Lk keys, D head_dim,
// T = num_tiles(Lq, G), U = summary_rows(selector, Lk), Ds = summary_dim(selector, D),
// N = num_blocks(Lk), P = num_far_pools(Lk), R = num_far_sums(Lk).
#pragma once

#include <cstdint>

#include "condensate/far_field.h"
#include "condensate/geometry.h"
#include "condensate/selectors.h"
#include "condensate/types.h"

namespace condensate {

// Sizes and ranges that the stages share.
struct Problem {
    DType dtype = DType::kFloat32;  // of query, key, value, summaries and out
    int64_t batch = 0;
    int64_t query_heads = 0;
    int64_t kv_heads = 0;
    int64_t query_len = 0;
    int64_t kv_len = 0;
    int64_t head_dim = 0;
    int64_t window = 0;
    int64_t anchors = 0;
    bool causal = true;
    float scale = 1.0f;

    CONDENSATE_HOST_DEVICE int group() const { return static_cast<int>(query_heads / kv_heads); }
    CONDENSATE_HOST_DEVICE Ranges ranges() const { return {kv_len, window, anchors, causal}; }
    // A window that holds every key; queries before the first key reach further than Lk.
    CONDENSATE_HOST_DEVICE int64_t full_window() const { return max_i64(query_len, kv_len); }
};

// The sizes of keys alone, for the parameters of a stage that has no queries.
template <class Params>
void set_key_sizes(const Problem& problem, Params* params) {
    params->dtype = problem.dtype;
    params->batch = problem.batch;
    params->kv_heads = problem.kv_heads;
    params->kv_len = problem.kv_len;
    params->head_dim = problem.head_dim;
}

// key -> summaries: what selection needs to know about the keys, one pass over them.
struct BlockSummaryParams {
    DType dtype = DType::kFloat32;
    int64_t batch = 0;
    int64_t kv_heads = 0;
    int64_t kv_len = 0;
    int64_t head_dim = 0;
    Selector selector = Selector::kBlock;  // not kExact
    ConstTensor4 key;                      // [B, Hkv, Lk, D]
    void* summaries = nullptr;             // [B, Hkv, U, Ds] contiguous, dtype; units past Lk are 0
};

// query, summaries -> one ascending list of blocks per tile.
struct BlockSelectParams {
    Problem problem;
    Selector selector = Selector::kBlock;    // not kExact
    ConstTensor4 query;                      // [B, Hq, Lq, D]
    const void* summaries = nullptr;         // [B, Hkv, U, Ds] contiguous, dtype
    ConstTensor4 key;                        // [B, Hkv, Lk, D], or none: refines a single query
    int64_t max_blocks = 0;                  // K: width of the lists, the budget in blocks
    const int32_t* head_keys = nullptr;      // [Hkv] budgets in keys, at most K blocks; or null
    bool far_field = false;                  // of the attention that the lists are for
    float top_p = 0.0f;                      // in (0, 1]: mass that lists must hold; 0: K blocks
    int32_t* block_indices = nullptr;        // [B, Hkv, T, K] ascending, -1 padded
    int32_t* block_counts = nullptr;         // [B, Hkv, T]
    float* omitted_mass_estimate = nullptr;  // [B, Hq, Lq] or null
    void* workspace = nullptr;               // block_select_workspace_bytes(); null where that is 0

    // Budget in blocks of KV head `kv_head`.
    CONDENSATE_HOST_DEVICE int64_t head_blocks(int64_t kv_head) const {
        return head_keys ? budget_blocks(head_keys[kv_head], max_blocks) : max_blocks;
    }
    CONDENSATE_HOST_DEVICE Refinement refinement() const {
        return refinement_of(selector, problem.query_len, problem.kv_len, key.data != nullptr);
    }
    // What no list of a tile, or scan tile, of so many positions needs.
    CONDENSATE_HOST_DEVICE WholeBlocks whole_blocks(int positions) const {
        if (!far_field) return WholeBlocks::kNone;
        return positions == tile_positions(problem.group()) ? WholeBlocks::kAll
                                                            : WholeBlocks::kAnchors;
    }
};

// One mean row a block, rounded to dtype: row n of a head is the mean over keys of block n.
struct BlockMeans {
    const void* data = nullptr;  // [B, Hkv, N, D] with the strides below, dtype
    int64_t stride_head = 0;     // elements, between KV heads of all batches
    int64_t stride_block = 0;    // elements

    CONDENSATE_HOST_DEVICE bool given() const { return data != nullptr; }
};

// Means of blocks -> pools of the far field, their running sums and means.
struct FarPoolsParams {
    DType dtype = DType::kFloat32;
    int64_t batch = 0;
    int64_t kv_heads = 0;
    int64_t kv_len = 0;
    int64_t head_dim = 0;
    BlockMeans key;         // coarse units of `block` summaries, or `mean` summaries of key
    BlockMeans value;       // `mean` summaries of value
    float* sums = nullptr;  // [2 (key, value), B, Hkv, R, D] contiguous: over keys, pool by pool
    void* means = nullptr;  // [2 (key, value), B, Hkv, P, D] contiguous, dtype: of whole pools
};

// What attention needs for the far field; without key.data there is none.
struct FarField {
    BlockMeans key, value;
    const float* sums = nullptr;  // as FarPoolsParams wrote them
    const void* means = nullptr;
};

// query, key -> the score of the topk-th key outside anchors and window, per query and head.
// Key j is selected iff score > threshold, or score == threshold and j <= tie_index.
struct TokenSelectParams {
    Problem problem;
    ConstTensor4 query;  // [B, Hq, Lq, D]
    ConstTensor4 key;    // [B, Hkv, Lk, D]
    ConstTensor4 value;  // of the attention that will use the thresholds, or none: only
                         // its layout counts, since both must score on the same path
    int64_t topk = 0;
    float* threshold = nullptr;    // [B, Hq, Lq]; -inf where fewer than topk keys can be selected
    int32_t* tie_index = nullptr;  // [B, Hq, Lq]
    float* lse_full = nullptr;     // [B, Hq, Lq] natural log over all visible keys, or null
};

// Softmax attention over anchors, window and what was selected.
struct AttentionParams {
    Problem problem;
    ConstTensor4 query;                      // [B, Hq, Lq, D]
    ConstTensor4 key;                        // [B, Hkv, Lk, D]
    ConstTensor4 value;                      // [B, Hkv, Lk, D]
    const int32_t* block_indices = nullptr;  // [B, Hkv, T, K] strictly ascending, or null
    const int32_t* block_counts = nullptr;   // [B, Hkv, T], null with block_indices
    int64_t max_blocks = 0;                  // K
    const float* threshold = nullptr;        // [B, Hq, Lq] from TokenSelect, or null
    const int32_t* tie_index = nullptr;      // [B, Hq, Lq], null with threshold
    FarField far_field;                      // or none; none where threshold is given
    void* out = nullptr;                     // [B, Hq, Lq, D] contiguous, dtype
    float* lse = nullptr;                    // [B, Hq, Lq] natural log, or null
    float* omitted_mass_estimate = nullptr;  // [B, Hq, Lq] or null; null without far field
};

// query, key, lse of a support -> the softmax mass outside it, by scoring every visible key.
struct OmittedMassParams {
    Problem problem;                // window and anchors are not used
    ConstTensor4 query;             // [B, Hq, Lq, D]
    ConstTensor4 key;               // [B, Hkv, Lk, D]
    const float* lse = nullptr;     // [B, Hq, Lq] contiguous
    const int64_t* rows = nullptr;  // [R] query indices to audit, or null for all
    int64_t num_rows = 0;           // R; Lq when rows is null
    float* omitted = nullptr;       // [B, Hq, R] in [0, 1]
};

// LSE of a support and LSE of all keys -> the softmax mass outside the support.
struct OmittedFromLseParams {
    int64_t rows = 0;                 // B * Hq * Lq
    const float* lse = nullptr;       // [rows]
    const float* lse_full = nullptr;  // [rows]
    float* omitted = nullptr;         // [rows] in [0, 1], 0 where no key is seen; may be lse_full
};

// Two attention results over disjoint supports -> the result over their union.
struct MergeStatesParams {
    DType dtype = DType::kFloat32;
    int64_t rows = 0;  // B * Hq * Lq
    int64_t head_dim = 0;
    const void* out_a = nullptr;   // [rows, D]
    const float* lse_a = nullptr;  // [rows]
    const void* out_b = nullptr;   // [rows, D]
    const float* lse_b = nullptr;  // [rows]
    void* out = nullptr;           // [rows, D]
    float* lse = nullptr;          // [rows]
};

}  // namespace condensate
