// Selection by wgmma and TMA, for selector "block": makes the tensor maps, chooses the
// instantiations by element type and padded dimension.
#include "kernels/block_select/common/stages.h"
#include "kernels/tensor_map.h"

namespace condensate::kernels {
namespace {

using namespace block_select;

// Boxes of `units` units of each of `blocks` blocks.
Status make_unit_map(const BlockSelectParams& params, int units, int blocks, CUtensorMap* map) {
    const Problem& p = params.problem;
    const int64_t rows = rows_per_block(Selector::kBlock), count = num_blocks(p.kv_len);
    const ConstTensor4 summaries = {params.summaries, count * rows * p.head_dim, rows * p.head_dim,
                                    p.head_dim};
    return make_tensor_map(
        {summaries, p.batch * p.kv_heads, count, rows, p.head_dim, p.dtype, blocks, units}, map);
}

Status make_maps(const BlockSelectParams& params, UnitMaps* maps) {
    constexpr int kShort = kShortUnits.per_block;
    Status status = make_unit_map(params, 1, kChunkUnits, &maps->coarse_chunk);
    if (status.ok())
        status = make_unit_map(params, kShort, kChunkUnits / kShort, &maps->short_chunk);
    if (status.ok()) status = make_unit_map(params, kShort, 1, &maps->short_block);
    return status;
}

template <class T, int kDim>
Status scan_and_refine(const Call& call) {
    UnitMaps maps;
    Status status = make_maps(call.params, &maps);
    if (status.ok()) status = scan<ScanTraits<T, kDim, 8, Selector::kBlock, true>>(call, maps);
    if (!status.ok() || !call.workspace.refines) return status;
    if (call.params.refinement() == Refinement::kKeys) return refine_by_keys<T, kDim>(call);
    status = refine<RefineTraits<T, kDim, /*kKeys=*/false, true>>(call, maps);
    return status.ok() ? estimate<RefineTraits<T, kDim>>(call) : status;
}

template <class T>
Status choose_dim(const Call& call) {
    return call.params.problem.head_dim <= 64 ? scan_and_refine<T, 64>(call)
                                              : scan_and_refine<T, 128>(call);
}

}  // namespace

Status block_select_sm90(const BlockSelectParams& params, const LaunchContext& context) {
    return select(params, context, [](const Call& call) {
        return call.params.problem.dtype == DType::kFloat16 ? choose_dim<__half>(call)
                                                            : choose_dim<__nv_bfloat16>(call);
    });
}

}  // namespace condensate::kernels
