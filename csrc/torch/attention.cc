// attention, attention_forward and block_sparse_attention: tensors are checked and allocated here,
// the call is planned and run by the core.
#include "condensate/condensate.h"
#include "torch/ops.h"
#include "torch/policy.h"
#include "torch/tensor_args.h"
#include "torch/workspace.h"

namespace condensate::ops {
namespace {

AttentionCall checked_call(const char* op, const Tensor& query, const Tensor& key,
                           const Tensor& value, const Mask& mask) {
    const Argument q{op, "query", query}, k{op, "key", key}, v{op, "value", value};
    AttentionCall call;
    call.query = view4(q);
    call.key = view4(k);
    call.value = view4(v);
    call.problem = make_problem(q, k, mask);
    check_value(v, k);
    return call;
}

AttentionCall policy_call(const char* op, const Tensor& query, const Tensor& key,
                          const Tensor& value, const Mask& mask, const Budget& budget,
                          const std::optional<bool>& far_field, int64_t selector_number) {
    const Selector selector = parse_selector(op, selector_number);
    const bool condenses = resolve_far_field(op, far_field, selector);
    check_budget(op, budget, selector);
    AttentionCall call = checked_call(op, query, key, value, mask);
    call.selector = selector;
    call.far_field = condenses;
    call.topk = budget.topk;
    call.top_p = list_share(budget);
    call.head_keys = head_budgets(budget, {op, "query", query}, call.problem.kv_heads);
    return call;
}

Tensor allocate_rows(const char* op, const Tensor& query) {
    return allocate(op, query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
}

Tensor allocate_out(const char* op, const Tensor& query) {
    return allocate(op, query, {query.size(0), query.size(1), query.size(2), query.size(3)},
                    query.scalar_type());
}

void run(const char* op, const Tensor& query, const AttentionCall& call) {
    const Executor executor = make_executor(op, query);
    Plan plan;
    check_status(plan_attention(call, executor, &plan));
    const Workspace workspace(op, query, plan.workspace_bytes);
    check_status(run_attention(call, plan, workspace.data(), executor));
}

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

}  // namespace

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t window,
                 int64_t anchors, int64_t topk, std::optional<Tensor> topk_per_head,
                 std::optional<double> top_p, std::optional<bool> far_field, int64_t selector,
                 bool causal, std::optional<double> scale) {
    const char* op = "attention";
    AttentionCall call = policy_call(op, query, key, value, {window, anchors, causal, scale},
                                     {topk, topk_per_head, top_p}, far_field, selector);
    Tensor out = allocate_out(op, query);
    call.out = out.mutable_data_ptr();
    run(op, query, call);
    return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t window, int64_t anchors,
    int64_t topk, std::optional<Tensor> topk_per_head, std::optional<double> top_p,
    std::optional<bool> far_field, int64_t selector, bool causal, std::optional<double> scale,
    bool wants_estimate) {
    const char* op = "attention_forward";
    AttentionCall call = policy_call(op, query, key, value, {window, anchors, causal, scale},
                                     {topk, topk_per_head, top_p}, far_field, selector);
    Tensor out = allocate_out(op, query), lse = allocate_rows(op, query);
    Tensor estimate =
        wants_estimate ? allocate_rows(op, query) : allocate(op, query, {0}, ScalarType::Float);
    call.out = out.mutable_data_ptr();
    call.lse = floats(lse);
    if (wants_estimate) call.omitted_mass_estimate = floats(estimate);
    run(op, query, call);
    return {out, lse, estimate};
}

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& block_indices,
                                                  const Tensor& block_counts, int64_t window,
                                                  int64_t anchors, bool far_field, bool causal,
                                                  std::optional<double> scale) {
    const char* op = "block_sparse_attention";
    AttentionCall call = checked_call(op, query, key, value, {window, anchors, causal, scale});
    const Problem& p = call.problem;
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
    call.given_lists = true;
    call.block_indices = static_cast<const int32_t*>(block_indices.const_data_ptr());
    call.block_counts = static_cast<const int32_t*>(block_counts.const_data_ptr());
    call.max_blocks = width;
    call.far_field = far_field;

    Tensor out = allocate_out(op, query), lse = allocate_rows(op, query);
    call.out = out.mutable_data_ptr();
    call.lse = floats(lse);
    run(op, query, call);
    return {out, lse};
}

}  // namespace condensate::ops
