#include "torch/far_field.h"

#include "condensate/condensate.h"
#include "host/number.h"
#include "torch/summaries.h"

namespace condensate::ops {

BlockMeans means_among(Selector selector, const void* summaries, const Problem& p) {
    if (selector == Selector::kQuest) return {};
    const UnitLevel level = selector == Selector::kBlock ? kCoarseUnits : kMeanUnits;
    const auto* first_row = static_cast<const std::byte*>(summaries) +
                            level.first_row * p.head_dim * dtype_bytes(p.dtype);
    return {first_row, summary_rows(selector, p.kv_len) * p.head_dim,
            rows_per_block(selector) * p.head_dim};
}

FarFieldStages::FarFieldStages(const Problem& problem, bool makes_key_means)
    : problem_(problem), makes_key_means_(makes_key_means) {
    const int64_t mean_bytes =
        summary_elements(problem, Selector::kMean) * dtype_bytes(problem.dtype);
    const int64_t elements = 2 * problem.batch * problem.kv_heads * problem.head_dim;
    if (makes_key_means) key_means_ = layout_.reserve(mean_bytes);
    value_means_ = layout_.reserve(mean_bytes);
    sums_ = layout_.reserve(elements * num_far_sums(problem.kv_len) *
                            static_cast<int64_t>(sizeof(float)));
    means_ = layout_.reserve(elements * num_far_pools(problem.kv_len) * dtype_bytes(problem.dtype));
}

void FarFieldStages::run(void* memory, BlockMeans key_means, const Executor& executor,
                         AttentionParams* attention) const {
    auto* base = static_cast<std::byte*>(memory);
    auto mean_rows = [&](const ConstTensor4& rows, std::byte* means) {
        make_summaries(problem_, Selector::kMean, rows, means, executor);
        return means_among(Selector::kMean, means, problem_);
    };
    FarPoolsParams pools;
    set_key_sizes(problem_, &pools);
    pools.key = makes_key_means_ ? mean_rows(attention->key, base + key_means_) : key_means;
    pools.value = mean_rows(attention->value, base + value_means_);
    pools.sums = reinterpret_cast<float*>(base + sums_);
    pools.means = base + means_;
    check_status(condensate::far_pools(pools, executor));
    attention->far_field = {pools.key, pools.value, pools.sums, pools.means};
}

}  // namespace condensate::ops
