// Selection by mma.sync of one element type: chooses the instantiations of scan and refinement by
// padded dimension, selector and rows.
#pragma once

#include "kernels/block_select/common/stages.h"

namespace condensate::kernels::block_select {

template <class T, int kDim>
Status scan_and_refine(const Call& call) {
    // A tile's averaged queries are one or two times 16 rows.
    Status status = call.params.problem.group() <= 16
                        ? scan<ScanTraits<T, kDim, 8, Selector::kBlock>>(call)
                        : scan<ScanTraits<T, kDim, 4, Selector::kBlock>>(call);
    if (!status.ok() || !call.workspace.refines) return status;
    if (call.params.refinement() == Refinement::kKeys) return refine_by_keys<T, kDim>(call);
    status = refine<RefineTraits<T, kDim>>(call);
    return status.ok() ? estimate<RefineTraits<T, kDim>>(call) : status;
}

template <class T, int kDim>
Status choose_selector(const Call& call) {
    return with_block_selector<Status>(call.params.selector, [&](auto constant) {
        constexpr Selector kSelector = decltype(constant)::kSelector;
        if constexpr (kSelector == Selector::kBlock) {
            return scan_and_refine<T, kDim>(call);
        } else {
            return scan<ScanTraits<T, kDim, 8, kSelector>>(call);
        }
    });
}

template <class T>
Status by_mma(const Call& call) {
    int dim = summary_dim(call.params.selector, static_cast<int>(call.params.problem.head_dim));
    if (dim <= 64) return choose_selector<T, 64>(call);
    if (dim <= 128) return choose_selector<T, 128>(call);
    return choose_selector<T, 256>(call);
}

// Each in a file of its own: they take the longest to compile.
extern template Status by_mma<__half>(const Call& call);
extern template Status by_mma<__nv_bfloat16>(const Call& call);

}  // namespace condensate::kernels::block_select
