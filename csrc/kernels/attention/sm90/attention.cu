// Chooses the instantiation: element type, head_dim, warpgroups of a tile, far field, estimate.

#include "kernels/attention/sm90/kernel.h"
#include "kernels/launch.h"
#include "kernels/tensor_map.h"

namespace condensate::kernels {
namespace {

Status make_maps(const AttentionParams& params, sm90::TensorMaps* maps) {
    const Problem& p = params.problem;
    const int positions = tile_positions(p.group());
    // The most heads of a box that divide the group and fill whole warpgroups or parts of one.
    maps->box_heads = 1;
    while (p.group() % (2 * maps->box_heads) == 0 && 2 * maps->box_heads * positions <= 64)
        maps->box_heads *= 2;

    const int64_t d = p.head_dim;
    ConstTensor4 out = {params.out, p.query_heads * p.query_len * d, p.query_len * d, d};
    auto of_queries = [&](const ConstTensor4& t) {
        return TensorBoxes{t, p.batch, p.query_heads,   p.query_len,
                           d, p.dtype, maps->box_heads, positions};
    };
    auto of_keys = [&](const ConstTensor4& t) {
        return TensorBoxes{t, p.batch, p.kv_heads, p.kv_len, d, p.dtype, 1, kBlockKeys};
    };
    Status status = make_tensor_map(of_queries(params.query), &maps->query);
    if (status.ok()) status = make_tensor_map(of_queries(out), &maps->out);
    if (status.ok()) status = make_tensor_map(of_keys(params.key), &maps->key);
    if (status.ok()) status = make_tensor_map(of_keys(params.value), &maps->value);
    if (!status.ok() || !params.far_field.key.given()) return status;

    maps->far = device::FarShape::of(p.kv_len);
    const int64_t heads = p.batch * p.kv_heads, pools = num_far_pools(p.kv_len);
    ConstTensor4 means = {params.far_field.means, heads * pools * d, pools * d, d};
    return make_tensor_map({means, 2, heads, pools, d, p.dtype, 1, kBlockKeys}, &maps->far_means);
}

template <class Traits>
Status run(const AttentionParams& params, const LaunchContext& context) {
    const Problem& p = params.problem;
    sm90::TensorMaps maps;
    Status status = make_maps(params, &maps);
    if (!status.ok()) return status;
    const auto schedule = sm90::Schedule::of(p);
    Grid grid = {min_i64(schedule.tiles(), int64_t{context.sm_count} * Traits::kCtasPerSm)};
    return launch(sm90::attention_sm90_kernel<Traits>, "attention_sm90", grid, Traits::kThreads,
                  sizeof(typename Traits::Smem), context, params, maps, schedule,
                  context.error_word);
}

template <class T, bool kFar, bool kEstimates>
Status choose(const AttentionParams& params, const LaunchContext& context) {
    using sm90::AttentionTraits;
    const int group = params.problem.group();
    const bool small = tile_positions(group) * group <= 64;
    if (params.problem.head_dim == 64)
        // Three CTAs would leave too few registers to the far field's warps.
        return small ? run<AttentionTraits<T, 64, 1, 1, kFar ? 2 : 3, kFar, kEstimates>>(params,
                                                                                         context)
                     : run<AttentionTraits<T, 64, 2, 2, 1, kFar, kEstimates>>(params, context);
    return small ? run<AttentionTraits<T, 128, 1, 1, 2, kFar, kEstimates>>(params, context)
                 : run<AttentionTraits<T, 128, 2, 2, 1, kFar, kEstimates>>(params, context);
}

template <class T>
Status choose_support(const AttentionParams& params, const LaunchContext& context) {
    if (!params.far_field.key.given()) return choose<T, false, false>(params, context);
    return params.omitted_mass_estimate ? choose<T, true, true>(params, context)
                                        : choose<T, true, false>(params, context);
}

}  // namespace

Status attention_sm90(const AttentionParams& params, const LaunchContext& context) {
    return params.problem.dtype == DType::kFloat16 ? choose_support<__half>(params, context)
                                                   : choose_support<__nv_bfloat16>(params, context);
}

}  // namespace condensate::kernels
