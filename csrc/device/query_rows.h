// The rows that a CTA of a key sweep works on, and which keys each of them may see or select.
#pragma once

#include <cstdint>

#include "condensate/tile.h"

namespace condensate::kernels {

// Consecutive rows of one KV head. Row f of a KV head is query f / group of its head f % group, so
// that rows which see nearly the same keys are neighbours, whatever the group.
struct RowGroup : Sequence {
    int batch;
    int kv_head;
    int group;
    int64_t first_row;
    int64_t end_row;

    // `head` counts [B, Hkv].
    __device__ RowGroup(const Problem& p, int64_t head)
        : Sequence(p, head / p.kv_heads),
          batch(static_cast<int>(head / p.kv_heads)),
          kv_head(static_cast<int>(head % p.kv_heads)),
          group(p.group()) {}

    __device__ bool exists(int row) const { return first_row + row < end_row; }
    // Which of the swept queries, and which query head, a row is.
    __device__ int64_t slot(int row) const { return (first_row + row) / group; }
    __device__ int64_t head(int row) const {
        return static_cast<int64_t>(kv_head) * group + (first_row + row) % group;
    }
    // Index of a row's `query` in a contiguous [B, Hq, Lq] tensor.
    __device__ int64_t flat_row(const Problem& p, int row, int64_t query) const {
        return (batch * p.query_heads + head(row)) * p.query_len + query;
    }
    // Keys [0, end) that a query sees.
    __device__ int32_t visible_keys(const Problem& p, int64_t query) const {
        if (!p.causal) return static_cast<int32_t>(kv_len);
        return static_cast<int32_t>(max_i64(min_i64(position_of(query) + 1, kv_len), 0));
    }
    // No row has a candidate at or past this key; the last row sees keys [0, last_visible_end).
    __device__ int32_t candidates_end(const Problem& p, int32_t last_visible_end) const {
        if (!p.causal) return last_visible_end;
        return max(last_visible_end - static_cast<int32_t>(min_i64(p.window, kv_len)), 0);
    }
    __device__ int32_t anchor_keys(const Problem& p) const {
        return static_cast<int32_t>(min_i64(p.anchors, kv_len));
    }
};

// CTAs of kRows rows that cover `num_queries` queries of every head.
template <int kRows>
int64_t row_groups(const Problem& problem, int64_t num_queries) {
    return problem.batch * problem.kv_heads *
           ceil_div(num_queries * problem.group(), static_cast<int64_t>(kRows));
}
// The rows of this CTA; the last rows of a head, which see most keys, come first.
template <int kRows>
__device__ RowGroup row_group_of_cta(const Problem& problem, int64_t num_queries) {
    const int64_t end_row = num_queries * problem.group();
    const int64_t groups = ceil_div(end_row, static_cast<int64_t>(kRows));
    RowGroup rows(problem, blockIdx.x / groups);
    rows.end_row = end_row;
    rows.first_row = (groups - 1 - blockIdx.x % groups) * kRows;
    return rows;
}

// What a CTA keeps in shared memory of each of its rows.
template <int kRows>
struct RowTable {
    int64_t query[kRows];        // -1: no such row
    int32_t visible_end[kRows];  // keys [0, visible_end) are visible
    int32_t last_visible_end;    // largest of the CTA
};

// Fills the table; `query_of(slot)` is the query index of a swept query, -1 if it has none. All
// threads (at least kRows) call it; the table is visible to all on return.
template <int kRows, class QueryOf>
__device__ void fill_row_table(RowTable<kRows>& table, const RowGroup& rows, const Problem& problem,
                               QueryOf&& query_of) {
    if (threadIdx.x == 0) table.last_visible_end = 0;
    __syncthreads();
    int row = static_cast<int>(threadIdx.x);
    if (row < kRows) {
        int64_t query = rows.exists(row) ? query_of(rows.slot(row)) : -1;
        int32_t end = query >= 0 ? rows.visible_keys(problem, query) : 0;
        table.query[row] = query;
        table.visible_end[row] = end;
        atomicMax(&table.last_visible_end, end);
    }
    __syncthreads();
}

// Which keys a row may select: visible, no anchor, not in its window.
struct CandidateBounds {
    int32_t low_end;     // [anchors, low_end), before the window
    int32_t high_begin;  // [high_begin, end), after it (none when causal)
    int32_t end;

    __device__ bool contains(int32_t anchors, int32_t key) const {
        return key >= anchors && key < end && (key < low_end || key >= high_begin);
    }
};

// Of the row of `query`, which sees keys [0, end).
__device__ __forceinline__ CandidateBounds candidate_bounds(const RowGroup& rows, const Problem& p,
                                                            int64_t query, int32_t end) {
    int64_t position = rows.position_of(query);
    int64_t low = min_i64(max_i64(position - p.window + 1, 0), end);
    int64_t high = p.causal ? end : min_i64(max_i64(position + p.window, 0), end);
    return {static_cast<int32_t>(low), static_cast<int32_t>(high), end};
}

}  // namespace condensate::kernels
