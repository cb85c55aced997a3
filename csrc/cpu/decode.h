// The stages of decoding on the CPU: scan of the summaries, lists and attention of the queries
// that select, dense attention of the others in chunks of keys.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "condensate/decode.h"
#include "cpu/decode_rows.h"

namespace condensate::cpu {

// What all stages know of a call. A row is a (query, head of the group) of one KV head.
struct DecodeCall {
    DecodeCall(const DecodeParams& params, const Executor& executor);

    int64_t length(int64_t b) const { return cache_length(p.cache, b); }
    DecodeSpan span(int64_t b, int64_t i) const {
        return decode_span(length(b) - p.query_len + i, p.window, p.anchors, pool);
    }
    bool is_dense(int64_t b, int64_t i) const {
        return p.mode == DecodeMode::kDense ||
               (p.mode == DecodeMode::kSelectAndAttend && attends_densely(span(b, i), p.shortlist));
    }
    bool scans(int64_t b, int64_t i) const {
        return p.mode != DecodeMode::kGivenTokens && !is_dense(b, i);
    }
    int64_t head(int64_t kv, int g) const { return kv * group + g; }
    int64_t row(int64_t b, int64_t kv, int64_t i, int g) const {
        return (b * p.query_heads + head(kv, g)) * p.query_len + i;
    }
    // The query of a row as floats.
    void load_query(int64_t b, int64_t kv, int64_t i, int g, float* target) const;
    SequenceRows rows_of(int64_t b, int64_t kv) const { return {p.cache, b, kv, dim}; }
    float* scores_of_units(int64_t row) const { return unit_scores.get() + row * unit_stride; }

    const DecodeParams& p;
    const Executor& executor;
    const TileOps& ops;
    int group, dim, pool;
    int64_t longest = 0;  // of all lengths
    bool any_dense = false, any_selects = false, any_scans = false;
    int64_t unit_stride = 0;
    std::unique_ptr<float[]> unit_scores;  // [B, Hq, Lq, unit_stride] of the rows that scan
    std::atomic<uint32_t> errors{0};
};

// A row's softmax so far.
struct RowSum {
    float max;
    double sum;
};
// Writes a row: its values over the sum, with the head's sink; `values` are weighted by
// exp(score - max).
void finish_row(const DecodeCall& call, int64_t b, int64_t kv, int64_t i, int g, RowSum row,
                const float* values);
void set_estimate(const DecodeCall& call, int64_t row, float estimate);

Status scan_units(DecodeCall& call);
Status select_and_attend(DecodeCall& call);
Status attend_densely(DecodeCall& call);

}  // namespace condensate::cpu
