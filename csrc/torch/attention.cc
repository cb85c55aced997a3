// attention, attention_forward and block_sparse_attention. The first two are one composition:
// everything when the budget covers the keys, else selection by tokens or by blocks, the far field
// where it is wanted, then attention.
#include <torch/csrc/stable/ops.h>

#include "condensate/condensate.h"
#include "torch/exact_estimate.h"
#include "torch/far_field.h"
#include "torch/ops.h"
#include "torch/policy.h"
#include "torch/scratch.h"
#include "torch/summaries.h"
#include "torch/tensor_args.h"

namespace condensate::ops {
namespace {

// A checked call; the stages read it and fill in their part of `attention`.
struct Call {
    const char* op;
    const Tensor& query;
    Selector selector;
    Budget budget;
    bool far_field;
    Executor executor;
    AttentionParams attention;
};

Call checked_call(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Mask& mask, Selector selector, const Budget& budget, bool far_field) {
    const Argument q{op, "query", query}, k{op, "key", key}, v{op, "value", value};
    Call call{op, query, selector, budget, far_field, {}, {}};
    call.attention.query = view4(q);
    call.attention.key = view4(k);
    call.attention.value = view4(v);
    call.attention.problem = make_problem(q, k, mask);
    check_value(v, k);
    call.executor = make_executor(op, query);
    return call;
}

Tensor allocate_rows(const Call& call, ScalarType type) {
    const Problem& p = call.attention.problem;
    return allocate(call.op, call.query, {p.batch, p.query_heads, p.query_len}, type);
}

Tensor allocate_out(Call& call) {
    const Problem& p = call.attention.problem;
    Tensor out = allocate(call.op, call.query, {p.batch, p.query_heads, p.query_len, p.head_dim},
                          call.query.scalar_type());
    call.attention.out = out.mutable_data_ptr();
    return out;
}

// Where the estimate and its ingredients go; both null when only the output is wanted.
struct Details {
    Tensor* lse = nullptr;
    Tensor* estimate = nullptr;
};

void attend_everything(Call& call, const Details& details) {
    Problem& p = call.attention.problem;
    // Queries before the first key (Lq > Lk) reach further than Lk when the call is not causal.
    p.window = max_i64(p.query_len, p.kv_len);
    if (details.estimate) torch::stable::zero_(*details.estimate);
    check_status(condensate::attention(call.attention, call.executor));
}

void attend_selected_tokens(Call& call, const Details& details) {
    const Problem& p = call.attention.problem;
    const int64_t rows = p.batch * p.query_heads * p.query_len;
    Scratch scratch;
    const int64_t threshold = scratch.reserve(rows * static_cast<int64_t>(sizeof(float)));
    const int64_t tie_index = scratch.reserve(rows * static_cast<int64_t>(sizeof(int32_t)));
    scratch.allocate(call.op, call.query);

    TokenSelectParams select;
    select.problem = p;
    select.query = call.attention.query;
    select.key = call.attention.key;
    select.value = call.attention.value;
    select.topk = call.budget.topk;
    select.threshold = scratch.pointer<float>(threshold);
    select.tie_index = scratch.pointer<int32_t>(tie_index);
    // The estimate's memory first holds the log-sum-exp over all keys.
    if (details.estimate)
        select.lse_full = static_cast<float*>(details.estimate->mutable_data_ptr());
    check_status(condensate::select_tokens(select, call.executor));

    call.attention.threshold = select.threshold;
    call.attention.tie_index = select.tie_index;
    check_status(condensate::attention(call.attention, call.executor));
    if (details.estimate) omitted_from_lse(*details.lse, *details.estimate);
}

void attend_selected_blocks(Call& call, const Details& details) {
    const Problem& p = call.attention.problem;
    BlockSelectParams select;
    select.problem = p;
    select.selector = call.selector;
    select.query = call.attention.query;
    select.key = call.attention.key;
    select.far_field = call.far_field;
    apply_budget(call.budget, {call.op, "query", call.query}, &select);
    const FarFieldStages far_field(p, /*makes_key_means=*/call.selector == Selector::kQuest);

    const int64_t tiles = p.batch * p.kv_heads * num_tiles(p.query_len, p.group());
    Scratch scratch;
    const int64_t summaries = scratch.reserve(summary_elements(p, call.selector) *
                                              static_cast<int64_t>(call.query.element_size()));
    const int64_t indices =
        scratch.reserve(tiles * select.max_blocks * static_cast<int64_t>(sizeof(int32_t)));
    const int64_t counts = scratch.reserve(tiles * static_cast<int64_t>(sizeof(int32_t)));
    // The selection's workspace, which the far field takes over once the lists exist.
    const int64_t workspace =
        scratch.reserve(max_i64(block_select_workspace_bytes(select, call.executor),
                                call.far_field ? far_field.bytes() : 0));
    scratch.allocate(call.op, call.query);

    make_summaries(p, call.selector, call.attention.key, scratch.pointer<void>(summaries),
                   call.executor);
    select.summaries = scratch.pointer<void>(summaries);
    select.block_indices = scratch.pointer<int32_t>(indices);
    select.block_counts = scratch.pointer<int32_t>(counts);
    select.workspace = scratch.pointer<void>(workspace);
    if (details.estimate) {
        // A single query's selection looks at keys. Of others the attention sees more, where it
        // has a far field.
        const bool by_attention = call.far_field && p.query_len > 1;
        (by_attention ? call.attention.omitted_mass_estimate : select.omitted_mass_estimate) =
            static_cast<float*>(details.estimate->mutable_data_ptr());
    }
    check_status(condensate::select_blocks(select, call.executor));

    call.attention.block_indices = select.block_indices;
    call.attention.block_counts = select.block_counts;
    call.attention.max_blocks = select.max_blocks;
    if (call.far_field)
        far_field.run(scratch.pointer<void>(workspace),
                      means_among(call.selector, select.summaries, p), call.executor,
                      &call.attention);
    check_status(condensate::attention(call.attention, call.executor));
}

void attend_given_lists(Call& call) {
    Scratch scratch;
    if (call.far_field) {
        check_status(validate(call.attention));  // before stages that would report it as theirs
        const FarFieldStages stages(call.attention.problem, /*makes_key_means=*/true);
        const int64_t memory = scratch.reserve(stages.bytes());
        scratch.allocate(call.op, call.query);
        stages.run(scratch.pointer<void>(memory), {}, call.executor, &call.attention);
    }
    check_status(condensate::attention(call.attention, call.executor));
}

void attend(Call& call, const Details& details) {
    if (details.lse) call.attention.lse = static_cast<float*>(details.lse->mutable_data_ptr());
    // Before the composition changes ranges or sizes scratch by them.
    check_status(validate(call.attention));
    const Problem& p = call.attention.problem;
    if (!call.budget.per_head &&
        attends_everything(p.ranges(), p.query_len, call.budget.topk, call.selector))
        return attend_everything(call, details);
    if (call.selector == Selector::kExact) return attend_selected_tokens(call, details);
    return attend_selected_blocks(call, details);
}

Call policy_call(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                 const Mask& mask, const Budget& budget, const std::optional<bool>& far_field,
                 int64_t selector_number) {
    const Selector selector = parse_selector(op, selector_number);
    const bool condenses = resolve_far_field(op, far_field, selector);
    check_budget(op, budget, selector);
    Call call = checked_call(op, query, key, value, mask, selector, budget, condenses);
    // Whether blocks are ranked depends on the length, what the call accepts must not.
    check_status(validate_ranking_scale(op, call.attention.problem.scale, selector));
    return call;
}

}  // namespace

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t window,
                 int64_t anchors, int64_t topk, std::optional<Tensor> topk_per_head,
                 std::optional<double> top_p, std::optional<bool> far_field, int64_t selector,
                 bool causal, std::optional<double> scale) {
    Call call = policy_call("attention", query, key, value, {window, anchors, causal, scale},
                            {topk, topk_per_head, top_p}, far_field, selector);
    Tensor out = allocate_out(call);
    attend(call, {});
    return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t window, int64_t anchors,
    int64_t topk, std::optional<Tensor> topk_per_head, std::optional<double> top_p,
    std::optional<bool> far_field, int64_t selector, bool causal, std::optional<double> scale) {
    Call call =
        policy_call("attention_forward", query, key, value, {window, anchors, causal, scale},
                    {topk, topk_per_head, top_p}, far_field, selector);
    Tensor out = allocate_out(call);
    Tensor lse = allocate_rows(call, ScalarType::Float);
    Tensor estimate = allocate_rows(call, ScalarType::Float);
    attend(call, {&lse, &estimate});
    return {out, lse, estimate};
}

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& block_indices,
                                                  const Tensor& block_counts, int64_t window,
                                                  int64_t anchors, bool far_field, bool causal,
                                                  std::optional<double> scale) {
    const char* op = "block_sparse_attention";
    Call call = checked_call(op, query, key, value, {window, anchors, causal, scale},
                             Selector::kBlock, Budget{}, far_field);
    const Problem& p = call.attention.problem;
    const int64_t tiles = num_tiles(p.query_len, p.group());
    if (block_indices.dim() != 4)
        fail(
            op,
            "block_indices has shape " + shape_string(block_indices) +
                ", expected [batch, kv_heads, tiles, blocks] as select_blocks returns it; pass its "
                "results.");
    const int64_t width = block_indices.size(3);
    const Argument q{op, "query", query};
    check_contiguous({op, "block_indices", block_indices}, ScalarType::Int, q,
                     {p.batch, p.kv_heads, tiles, width});
    check_contiguous({op, "block_counts", block_counts}, ScalarType::Int, q,
                     {p.batch, p.kv_heads, tiles});
    call.attention.block_indices = static_cast<const int32_t*>(block_indices.const_data_ptr());
    call.attention.block_counts = static_cast<const int32_t*>(block_counts.const_data_ptr());
    call.attention.max_blocks = width;

    Tensor out = allocate_out(call);
    Tensor lse = allocate_rows(call, ScalarType::Float);
    call.attention.lse = static_cast<float*>(lse.mutable_data_ptr());
    attend_given_lists(call);
    return {out, lse};
}

}  // namespace condensate::ops
