#include "cpu/decode.h"

#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace condensate::cpu {

DecodeCall::DecodeCall(const DecodeParams& params, const Executor& executor_)
    : p(params),
      executor(executor_),
      ops(tile_ops()),
      group(params.group()),
      dim(static_cast<int>(params.head_dim)),
      pool(pool_keys(params.cache.page_size, params.cache.block_table != nullptr)) {
    for (int64_t b = 0; b < p.batch; ++b) {
        errors |= cache_errors(p.cache, b, length(b));
        longest = max_i64(longest, length(b));
        for (int64_t i = 0; i < p.query_len; ++i) {
            any_dense = any_dense || is_dense(b, i);
            any_selects = any_selects || !is_dense(b, i);
            any_scans = any_scans || scans(b, i);
        }
    }
    if (!any_scans) return;
    unit_stride = ceil_div(longest / kUnitKeys, kTileKeys) * kTileKeys;
    const int64_t rows = p.batch * p.query_heads * p.query_len;
    unit_scores.reset(new float[static_cast<size_t>(rows * unit_stride)]);
}

void DecodeCall::load_query(int64_t b, int64_t kv, int64_t i, int g, float* target) const {
    const ConstTensor4& q = p.query;
    const int64_t at = b * q.stride_batch + head(kv, g) * q.stride_head + i * q.stride_seq;
    ops.load_rows(p.dtype, static_cast<const char*>(q.data) + at * dtype_bytes(p.dtype), 0, 1, dim,
                  target, dim);
}

void finish_row(const DecodeCall& call, int64_t b, int64_t kv, int64_t i, int g, RowSum row,
                const float* values) {
    const DecodeParams& p = call.p;
    double factor = 1;
    if (p.sinks != nullptr && call.span(b, i).visible > 0) {
        const float sink = p.sinks[call.head(kv, g)];
        const float max = sink > row.max || sink != sink ? sink : row.max;
        factor = row.max == -std::numeric_limits<float>::infinity()
                     ? 0
                     : std::exp(static_cast<double>(row.max) - max);
        if (max > -std::numeric_limits<float>::infinity() || max != max)
            row.sum = row.sum * factor + std::exp(static_cast<double>(sink) - max);
        row.max = max;
    }
    const bool empty = row.max == -std::numeric_limits<float>::infinity() && row.sum == 0;
    const float inverse = empty ? 0.0f : static_cast<float>(factor / row.sum);
    const int64_t at =
        b * p.out_stride_batch + call.head(kv, g) * p.out_stride_head + i * p.out_stride_seq;
    for (int d = 0; d < call.dim; ++d)
        store_number(p.dtype, p.out, at + d, empty ? 0.0f : values[d] * inverse);
    if (p.lse != nullptr)
        p.lse[call.row(b, kv, i, g)] =
            empty ? row.max : static_cast<float>(static_cast<double>(row.max) + std::log(row.sum));
}

void set_estimate(const DecodeCall& call, int64_t row, float estimate) {
    if (call.p.omitted_mass_estimate != nullptr) call.p.omitted_mass_estimate[row] = estimate;
}

Status attention_with_kvcache(const DecodeParams& params, const Executor& executor,
                              uint32_t* errors) {
    DecodeCall call(params, executor);
    Status status;
    if (call.any_scans) status = scan_units(call);
    if (status.ok() && call.any_selects) status = select_and_attend(call);
    if (status.ok() && call.any_dense) status = attend_densely(call);
    *errors |= call.errors.load();
    return status;
}

}  // namespace condensate::cpu
