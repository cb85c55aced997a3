// block_summaries, select_blocks, select_tokens.
#include "condensate/condensate.h"
#include "host/validate.h"
#include "torch/ops.h"
#include "torch/policy.h"
#include "torch/tensor_args.h"
#include "torch/workspace.h"

namespace condensate::ops {
namespace {

void check_summaries(const Argument& summaries, const Argument& query, const Problem& problem,
                     Selector selector) {
    check_same_type_and_device(summaries, query);
    const Tensor& s = summaries.tensor;
    const int64_t rows = summary_rows(selector, problem.kv_len);
    const int64_t dim = summary_dim(selector, static_cast<int>(problem.head_dim));
    if (s.size(0) != problem.batch || s.size(2) != rows || s.size(3) != dim)
        fail(summaries.op, "summaries has shape " + shape_string(s) + ", expected [" +
                               std::to_string(problem.batch) + ", kv_heads, " +
                               std::to_string(rows) + ", " + std::to_string(dim) + "] for kv_len " +
                               std::to_string(problem.kv_len) +
                               "; make it with block_summaries and the same selector.");
    if (!s.is_contiguous())
        fail(summaries.op,
             "summaries is not contiguous, expected block_summaries' own result; "
             "call summaries.contiguous() first.");
}

// The keys that `summaries` describe.
ConstTensor4 view_key(const Argument& key, const Argument& query, const Problem& p) {
    const ConstTensor4 view = view4(key);
    check_same_type_and_device(key, query);
    const Tensor& k = key.tensor;
    if (k.size(0) != p.batch || k.size(1) != p.kv_heads || k.size(2) != p.kv_len ||
        k.size(3) != p.head_dim)
        fail(key.op, std::string(key.name) + " has shape " + shape_string(k) +
                         ", expected [batch, kv_heads, kv_len, head_dim] as query, summaries and "
                         "kv_len have them; pass the keys that were summarised.");
    return view;
}

}  // namespace

Tensor block_summaries(const Tensor& key, int64_t selector) {
    const char* op = "block_summaries";
    const Argument key_argument{op, "key", key};
    BlockSummaryParams params;
    params.selector = parse_selector(op, selector);
    params.key = view4(key_argument);
    params.dtype = element_type(key_argument);
    params.batch = key.size(0);
    params.kv_heads = key.size(1);
    params.kv_len = key.size(2);
    params.head_dim = key.size(3);
    Tensor summaries =
        allocate(op, key,
                 {params.batch, params.kv_heads, summary_rows(params.selector, params.kv_len),
                  summary_dim(params.selector, static_cast<int>(params.head_dim))},
                 key.scalar_type());
    params.summaries = summaries.mutable_data_ptr();
    check_status(condensate::block_summaries(params, make_executor(op, key)));
    return summaries;
}

std::tuple<Tensor, Tensor> select_blocks(const Tensor& query, const Tensor& summaries,
                                         std::optional<Tensor> key, int64_t kv_len, int64_t window,
                                         int64_t anchors, int64_t topk,
                                         std::optional<Tensor> topk_per_head,
                                         std::optional<double> top_p, bool far_field,
                                         int64_t selector, bool causal,
                                         std::optional<double> scale) {
    const char* op = "select_blocks";
    const Argument query_argument{op, "query", query}, summary_argument{op, "summaries", summaries};
    BlockSelectParams params;
    params.selector = parse_selector(op, selector);
    check_status(validate_block_selector(op, params.selector));
    const Budget budget{topk, topk_per_head, top_p};
    check_budget(op, budget, params.selector);
    params.query = view4(query_argument);
    view4(summary_argument);
    Problem& problem = params.problem;
    problem.dtype = element_type(query_argument);
    problem.batch = query.size(0);
    problem.query_heads = query.size(1);
    problem.kv_heads = summaries.size(1);
    problem.query_len = query.size(2);
    problem.kv_len = kv_len;
    problem.head_dim = query.size(3);
    problem.window = window;
    problem.anchors = anchors;
    problem.causal = causal;
    problem.scale = resolve_scale(scale, problem.head_dim);
    check_status(validate_heads(op, problem.query_heads, "summaries", problem.kv_heads));
    check_summaries(summary_argument, query_argument, problem, params.selector);

    params.summaries = summaries.const_data_ptr();
    if (key) params.key = view_key({op, "key", *key}, query_argument, problem);
    params.far_field = far_field;
    params.max_blocks = topk / kBlockKeys;
    params.top_p = list_share(budget);
    params.head_keys = head_budgets(budget, query_argument, problem.kv_heads);
    const int64_t tiles = num_tiles(problem.query_len, problem.group());
    Tensor indices = allocate(
        op, query, {problem.batch, problem.kv_heads, tiles, params.max_blocks}, ScalarType::Int);
    Tensor counts = allocate(op, query, {problem.batch, problem.kv_heads, tiles}, ScalarType::Int);
    params.block_indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    params.block_counts = static_cast<int32_t*>(counts.mutable_data_ptr());

    const Executor executor = make_executor(op, query);
    const Workspace workspace(op, query, block_select_workspace_bytes(params, executor));
    params.workspace = workspace.data();
    check_status(condensate::select_blocks(params, executor));
    return {indices, counts};
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& query, const Tensor& key, int64_t window,
                                         int64_t anchors, int64_t topk, bool causal,
                                         std::optional<double> scale) {
    const char* op = "select_tokens";
    const Argument query_argument{op, "query", query}, key_argument{op, "key", key};
    TokenSelectParams params;
    params.query = view4(query_argument);
    params.key = view4(key_argument);
    params.problem = make_problem(query_argument, key_argument, {window, anchors, causal, scale});
    params.topk = topk;
    const Problem& problem = params.problem;
    Tensor threshold = allocate(op, query, {problem.batch, problem.query_heads, problem.query_len},
                                ScalarType::Float);
    Tensor tie_index = allocate(op, query, {problem.batch, problem.query_heads, problem.query_len},
                                ScalarType::Int);
    params.threshold = static_cast<float*>(threshold.mutable_data_ptr());
    params.tie_index = static_cast<int32_t*>(tie_index.mutable_data_ptr());
    check_status(condensate::select_tokens(params, make_executor(op, query)));
    return {threshold, tie_index};
}

}  // namespace condensate::ops
