// Chooses the instantiation: element type, padded summary_dim, units per block.
#include "kernels/block_select/kernel.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

int64_t persistent_ctas(const BlockSelectParams& params, int sm_count) {
    const Problem& p = params.problem;
    int64_t items = p.batch * p.kv_heads * ceil_div(num_tiles(p.query_len, p.group()), 4);
    return min_i64(items, int64_t{sm_count} * block_select::kCtasPerSm);
}

template <class Traits>
Status run(const BlockSelectParams& params, const LaunchContext& context) {
    return launch(block_select::block_select_kernel<Traits>, "block_select_sm80",
                  {persistent_ctas(params, context.sm_count)}, Traits::kThreads,
                  sizeof(typename Traits::Smem), context, params);
}

template <class T, int kUnitsPerBlock>
Status choose_dim(const BlockSelectParams& params, const LaunchContext& context) {
    int dim = summary_dim(params.selector, static_cast<int>(params.problem.head_dim));
    if (dim <= 64) return run<block_select::Traits<T, 64, kUnitsPerBlock>>(params, context);
    if (dim <= 128) return run<block_select::Traits<T, 128, kUnitsPerBlock>>(params, context);
    return run<block_select::Traits<T, 256, kUnitsPerBlock>>(params, context);
}

template <class T>
Status choose_selector(const BlockSelectParams& params, const LaunchContext& context) {
    switch (params.selector) {
        case Selector::kQuest:
            return choose_dim<T, 4>(params, context);
        case Selector::kMean:
            return choose_dim<T, 1>(params, context);
        default:
            return choose_dim<T, 16>(params, context);
    }
}

}  // namespace

int64_t block_select_sm80_workspace_bytes(const BlockSelectParams& params, int sm_count) {
    // The smallest chunk of any instantiation has the most periods: 32 units.
    int chunk_blocks = 32 / units_per_block(params.selector);
    return persistent_ctas(params, sm_count) * 4 *
           block_select::tile_scratch_bytes(num_blocks(params.problem.kv_len), chunk_blocks);
}

Status block_select_sm80(const BlockSelectParams& params, const LaunchContext& context) {
    return params.problem.dtype == DType::kFloat16
               ? choose_selector<__half>(params, context)
               : choose_selector<__nv_bfloat16>(params, context);
}

}  // namespace condensate::kernels
