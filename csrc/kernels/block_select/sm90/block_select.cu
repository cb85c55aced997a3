// Selection by wgmma, for selector "block": chooses the instantiations by element type and padded
// dimension.
#include "kernels/block_select/stages.h"

namespace condensate::kernels {
namespace {

using namespace block_select;

template <class T, int kDim>
Status scan_and_refine(const Call& call) {
    Status status = scan<ScanTraits<T, kDim, 8, Selector::kBlock, true>>(call);
    if (status.ok()) status = refine<RefineTraits<T, kDim, true>>(call);
    return status.ok() ? estimate<RefineTraits<T, kDim, true>>(call) : status;
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
