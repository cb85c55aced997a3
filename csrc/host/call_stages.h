// Which stages a call is made of, what each reads and writes, and where that lies.
#pragma once

#include <cstddef>
#include <initializer_list>

#include "condensate/call.h"
#include "host/number.h"

namespace condensate {

// At most 2^58, far more than there is: sums of some such sizes do not overflow.
inline int64_t array_bytes(std::initializer_list<int64_t> sizes, int64_t element_bytes) {
    constexpr int64_t kMost = int64_t{1} << 58;
    int64_t bytes = element_bytes;
    for (int64_t size : sizes)
        if (size == 0) return 0;
    for (int64_t size : sizes) bytes = bytes > kMost / size ? kMost : bytes * size;
    return bytes;
}

// Where arrays lie in memory that holds all of them.
class Layout {
  public:
    explicit Layout(int64_t begin = 0) : end_(begin) {}
    int64_t reserve(int64_t bytes) {
        const int64_t offset = end_;
        end_ = ceil_div(offset + bytes, kAlignmentBytes) * kAlignmentBytes;
        return offset;
    }
    int64_t end() const { return end_; }

  private:
    static constexpr int64_t kAlignmentBytes = 256;
    int64_t end_;
};

// Which of the caller's rows the estimate of the omitted mass comes from.
inline bool estimates_by_attention(const AttentionCall& call) {
    // A single query's selection looks at keys. Of others the attention sees more, where it has a
    // far field.
    return call.far_field && (call.given_lists || call.problem.query_len > 1);
}

// The mean keys of blocks among the summaries that the selector makes; none if it makes none.
inline BlockMeans means_among(Selector selector, const void* summaries, const Problem& p) {
    const SelectorTraits traits = selector_traits(selector);
    if (!traits.has_block_means) return {};
    const auto* first_row = static_cast<const std::byte*>(summaries) +
                            traits.block_means.first_row * p.head_dim * dtype_bytes(p.dtype);
    return {first_row, summary_rows(selector, p.kv_len) * p.head_dim,
            traits.rows_per_block * p.head_dim};
}

// Visits the stages of a planned call in order, each with its parameters: visit(params) -> Status.
// The plan's selection and arrays are set, its stages are not read. `workspace` is only stepped
// through.
template <class Visit>
class CallStages {
  public:
    CallStages(const AttentionCall& call, const Plan& plan, std::byte* workspace, Visit visit)
        : call_(call), plan_(plan), workspace_(workspace), visit_(visit) {
        attention_.problem = call.problem;
        attention_.query = call.query;
        attention_.key = call.key;
        attention_.value = call.value;
        attention_.out = call.out;
        attention_.lse = call.lse;
    }

    Status visit_all() {
        switch (plan_.selection) {
            case Selection::kTokens:
                return attend_tokens();
            case Selection::kBlocks:
                return attend_blocks();
            case Selection::kGiven:
                return attend_given();
            default:
                attention_.problem.window = call_.problem.full_window();
                return visit_(attention_);
        }
    }

  private:
    template <class T = void>
    T* array(int64_t offset) const {
        return reinterpret_cast<T*>(workspace_ + offset);
    }

    Status summarise(Selector selector, const ConstTensor4& rows, void* summaries) {
        BlockSummaryParams params;
        set_key_sizes(call_.problem, &params);
        params.selector = selector;
        params.key = rows;
        params.summaries = summaries;
        return visit_(params);
    }

    Status attend_tokens() {
        const Problem& p = call_.problem;
        TokenSelectParams select;
        select.problem = p;
        select.query = call_.query;
        select.key = call_.key;
        select.value = call_.value;
        select.topk = call_.topk;
        select.threshold = array<float>(plan_.arrays.threshold);
        select.tie_index = array<int32_t>(plan_.arrays.tie_index);
        // The estimate's memory first holds the log-sum-exp over all keys.
        select.lse_full = call_.omitted_mass_estimate;
        Status status = visit_(select);
        if (!status.ok()) return status;

        attention_.threshold = select.threshold;
        attention_.tie_index = select.tie_index;
        const bool estimates = call_.omitted_mass_estimate != nullptr;
        if (estimates && !attention_.lse) attention_.lse = array<float>(plan_.arrays.lse);
        status = visit_(attention_);
        if (!status.ok() || !estimates) return status;

        OmittedFromLseParams omitted;
        omitted.rows = p.batch * p.query_heads * p.query_len;
        omitted.lse = attention_.lse;
        omitted.lse_full = select.lse_full;
        omitted.omitted = call_.omitted_mass_estimate;
        return visit_(omitted);
    }

    Status attend_blocks() {
        BlockSelectParams select;
        select.problem = call_.problem;
        select.selector = call_.selector;
        select.query = call_.query;
        select.key = call_.key;
        select.summaries = array(plan_.arrays.summaries);
        select.max_blocks = call_.topk / kBlockKeys;
        select.head_keys = call_.head_keys;
        select.top_p = call_.top_p;
        select.far_field = call_.far_field;
        select.block_indices = array<int32_t>(plan_.arrays.block_indices);
        select.block_counts = array<int32_t>(plan_.arrays.block_counts);
        select.workspace = array(plan_.arrays.shared);
        if (!estimates_by_attention(call_))
            select.omitted_mass_estimate = call_.omitted_mass_estimate;
        Status status = summarise(call_.selector, call_.key, array(plan_.arrays.summaries));
        if (status.ok()) status = visit_(select);
        if (!status.ok()) return status;
        return attend_lists(select.block_indices, select.block_counts, select.max_blocks,
                            means_among(call_.selector, select.summaries, call_.problem));
    }

    Status attend_given() {
        return attend_lists(call_.block_indices, call_.block_counts, call_.max_blocks, {});
    }

    Status attend_lists(const int32_t* indices, const int32_t* counts, int64_t width,
                        BlockMeans key_means) {
        attention_.block_indices = indices;
        attention_.block_counts = counts;
        attention_.max_blocks = width;
        if (call_.far_field) {
            Status status = condense(key_means);
            if (!status.ok()) return status;
        }
        if (estimates_by_attention(call_))
            attention_.omitted_mass_estimate = call_.omitted_mass_estimate;
        return visit_(attention_);
    }

    // Makes the far field; with mean keys where no summaries of the call hold them.
    Status condense(BlockMeans key_means) {
        const Problem& p = call_.problem;
        Status status;
        if (!key_means.given()) {
            void* rows = array(plan_.arrays.key_means);
            status = summarise(Selector::kMean, call_.key, rows);
            key_means = means_among(Selector::kMean, rows, p);
        }
        void* value_rows = array(plan_.arrays.value_means);
        if (status.ok()) status = summarise(Selector::kMean, call_.value, value_rows);
        FarPoolsParams pools;
        set_key_sizes(p, &pools);
        pools.key = key_means;
        pools.value = means_among(Selector::kMean, value_rows, p);
        pools.sums = array<float>(plan_.arrays.pool_sums);
        pools.means = array(plan_.arrays.pool_means);
        if (status.ok()) status = visit_(pools);
        attention_.far_field = {pools.key, pools.value, pools.sums, pools.means};
        return status;
    }

    const AttentionCall& call_;
    const Plan& plan_;
    std::byte* workspace_;
    Visit visit_;
    AttentionParams attention_;
};

}  // namespace condensate
