// omitted_mass and merge_states: what is done with an attention's log-sum-exp.
#include "condensate/condensate.h"
#include "torch/ops.h"
#include "torch/tensor_args.h"

namespace condensate::ops {

Tensor omitted_mass(const Tensor& query, const Tensor& key, const Tensor& lse,
                    std::optional<Tensor> rows, bool causal, std::optional<double> scale) {
    const char* op = "omitted_mass";
    const Argument query_argument{op, "query", query}, key_argument{op, "key", key};
    OmittedMassParams params;
    params.query = view4(query_argument);
    params.key = view4(key_argument);
    params.problem = make_problem(query_argument, key_argument, {0, 0, causal, scale});
    const Problem& problem = params.problem;
    check_contiguous({op, "lse", lse}, ScalarType::Float, query_argument,
                     {problem.batch, problem.query_heads, problem.query_len});
    params.lse = static_cast<const float*>(lse.const_data_ptr());
    params.num_rows = problem.query_len;
    if (rows.has_value()) {
        params.num_rows = rows->numel();
        check_contiguous({op, "rows", *rows}, ScalarType::Long, query_argument, {params.num_rows});
        params.rows = static_cast<const int64_t*>(rows->const_data_ptr());
    }
    Tensor omitted = allocate(op, query, {problem.batch, problem.query_heads, params.num_rows},
                              ScalarType::Float);
    if (params.num_rows == 0) return omitted;
    params.omitted = static_cast<float*>(omitted.mutable_data_ptr());
    check_status(condensate::omitted_mass(params, make_executor(op, query)));
    return omitted;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b) {
    const char* op = "merge_states";
    const Argument first{op, "out_a", out_a}, second{op, "out_b", out_b};
    view4(first);
    MergeStatesParams params;
    params.dtype = element_type(first);
    const int64_t batch = out_a.size(0), heads = out_a.size(1), length = out_a.size(2);
    params.rows = batch * heads * length;
    params.head_dim = out_a.size(3);
    check_contiguous(first, out_a.scalar_type(), first, {batch, heads, length, params.head_dim});
    check_same_type_and_device(second, first);
    check_contiguous(second, out_a.scalar_type(), first, {batch, heads, length, params.head_dim});
    check_contiguous({op, "lse_a", lse_a}, ScalarType::Float, first, {batch, heads, length});
    check_contiguous({op, "lse_b", lse_b}, ScalarType::Float, first, {batch, heads, length});

    Tensor out = allocate(op, out_a, {batch, heads, length, params.head_dim}, out_a.scalar_type());
    Tensor lse = allocate(op, out_a, {batch, heads, length}, ScalarType::Float);
    params.out_a = out_a.const_data_ptr();
    params.lse_a = static_cast<const float*>(lse_a.const_data_ptr());
    params.out_b = out_b.const_data_ptr();
    params.lse_b = static_cast<const float*>(lse_b.const_data_ptr());
    params.out = out.mutable_data_ptr();
    params.lse = static_cast<float*>(lse.mutable_data_ptr());
    check_status(condensate::merge_states(params, make_executor(op, out_a)));
    return {out, lse};
}

}  // namespace condensate::ops
