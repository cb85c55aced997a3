// The operators of the namespace condensate, one function per schema in library.cc.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace condensate::ops {

using torch::stable::Tensor;

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t window,
                 int64_t anchors, int64_t topk, std::optional<Tensor> topk_per_head,
                 std::optional<double> top_p, std::optional<bool> far_field, int64_t selector,
                 bool causal, std::optional<double> scale);

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t window, int64_t anchors,
    int64_t topk, std::optional<Tensor> topk_per_head, std::optional<double> top_p,
    std::optional<bool> far_field, int64_t selector, bool causal, std::optional<double> scale,
    bool estimate);

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& block_indices,
                                                  const Tensor& block_counts, int64_t window,
                                                  int64_t anchors, bool far_field, bool causal,
                                                  std::optional<double> scale);

Tensor block_summaries(const Tensor& key, int64_t selector);

std::tuple<Tensor, Tensor> select_blocks(const Tensor& query, const Tensor& summaries,
                                         std::optional<Tensor> key, int64_t kv_len, int64_t window,
                                         int64_t anchors, int64_t topk,
                                         std::optional<Tensor> topk_per_head,
                                         std::optional<double> top_p, bool far_field,
                                         int64_t selector, bool causal,
                                         std::optional<double> scale);

std::tuple<Tensor, Tensor> select_tokens(const Tensor& query, const Tensor& key, int64_t window,
                                         int64_t anchors, int64_t topk, bool causal,
                                         std::optional<double> scale);

Tensor omitted_mass(const Tensor& query, const Tensor& key, const Tensor& lse,
                    std::optional<Tensor> rows, bool causal, std::optional<double> scale);

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b);

}  // namespace condensate::ops
