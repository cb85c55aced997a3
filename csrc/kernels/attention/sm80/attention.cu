// Chooses the instantiation: element type, padded head_dim, rows per CTA, exact thresholds, far
// field.
#include "kernels/attention/sm80/kernel.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

template <class Traits>
Status run(const AttentionParams& params, const LaunchContext& context) {
    const Problem& p = params.problem;
    int rows = tile_positions(p.group()) * p.group();
    int parts = static_cast<int>(ceil_div(rows, Traits::kRows));
    Grid grid = {p.batch * p.kv_heads * num_tiles(p.query_len, p.group()) * parts};
    return launch(sm80::attention_sm80_kernel<Traits>, "attention_sm80", grid, Traits::kThreads,
                  sizeof(typename Traits::Smem), context, params, parts, context.error_word);
}

template <class T, int kDim, bool kFar>
Status choose_rows(const AttentionParams& params, const LaunchContext& context) {
    const Problem& p = params.problem;
    if constexpr (kDim <= 128) {  // 32 rows of 256 output channels do not fit a warp's registers
        int64_t positions = min_i64(tile_positions(p.group()), p.query_len);
        using Wide = sm80::AttentionTraits<T, kDim, 2, false, kFar>;
        const bool suits = Wide::kEstimates || !params.omitted_mass_estimate;
        if (positions * p.group() > 64 && suits) return run<Wide>(params, context);
    }
    return run<sm80::AttentionTraits<T, kDim, 1, false, kFar>>(params, context);
}

template <class T, int kDim>
Status choose_support(const AttentionParams& params, const LaunchContext& context) {
    if (params.threshold)
        return run<sm80::AttentionTraits<T, kDim, 1, true, false>>(params, context);
    return params.far_field.key.given() ? choose_rows<T, kDim, true>(params, context)
                                        : choose_rows<T, kDim, false>(params, context);
}

template <class T>
Status choose_dim(const AttentionParams& params, const LaunchContext& context) {
    if (params.problem.head_dim <= 64) return choose_support<T, 64>(params, context);
    if (params.problem.head_dim <= 128) return choose_support<T, 128>(params, context);
    return choose_support<T, 256>(params, context);
}

}  // namespace

Status attention_sm80(const AttentionParams& params, const LaunchContext& context) {
    return params.problem.dtype == DType::kFloat16 ? choose_dim<__half>(params, context)
                                                   : choose_dim<__nv_bfloat16>(params, context);
}

}  // namespace condensate::kernels
