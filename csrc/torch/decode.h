// The operators that decode over a cache, one function per schema in library.cc.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace condensate::ops {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> attention_with_kvcache(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, std::optional<Tensor> block_table, std::optional<Tensor> summaries,
    std::optional<Tensor> summary_scales, std::optional<Tensor> key_center, int64_t window,
    int64_t anchors, int64_t topk, int64_t shortlist, std::optional<double> top_p, bool far_field,
    std::optional<Tensor> sinks, double softcap, std::optional<double> scale,
    std::optional<Tensor> key_scale, std::optional<Tensor> value_scale);

std::tuple<Tensor, Tensor> attention_with_kvcache_(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, Tensor out, std::optional<Tensor> block_table,
    std::optional<Tensor> summaries, std::optional<Tensor> summary_scales,
    std::optional<Tensor> key_center, int64_t window, int64_t anchors, int64_t topk,
    int64_t shortlist, std::optional<double> top_p, bool far_field, std::optional<Tensor> sinks,
    double softcap, std::optional<double> scale, std::optional<Tensor> key_scale,
    std::optional<Tensor> value_scale);

std::tuple<Tensor, Tensor> select_tokens_with_kvcache(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, std::optional<Tensor> block_table, std::optional<Tensor> summaries,
    std::optional<Tensor> summary_scales, std::optional<Tensor> key_center, int64_t window,
    int64_t anchors, int64_t topk, int64_t shortlist, std::optional<double> top_p, double softcap,
    std::optional<double> scale, std::optional<Tensor> key_scale);

std::tuple<Tensor, Tensor> token_sparse_attention_with_kvcache(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, const Tensor& token_indices, const Tensor& token_counts,
    std::optional<Tensor> block_table, int64_t window, int64_t anchors, std::optional<Tensor> sinks,
    double softcap, std::optional<double> scale, std::optional<Tensor> key_scale,
    std::optional<Tensor> value_scale);

void update_kv_summaries_(Tensor summaries, Tensor summary_scales, const Tensor& key_cache,
                          const Tensor& value_cache, const Tensor& cache_seqlens, int64_t appended,
                          std::optional<Tensor> block_table, std::optional<Tensor> key_center,
                          std::optional<Tensor> key_scale, std::optional<Tensor> value_scale);

}  // namespace condensate::ops
