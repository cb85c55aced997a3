// The launches of a selection: scan, refinement, estimate.
#pragma once

#include "kernels/block_select/common/estimate.h"
#include "kernels/block_select/common/refine.h"
#include "kernels/block_select/common/scan.h"
#include "kernels/block_select/common/workspace.h"
#include "kernels/launch.h"

namespace condensate::kernels::block_select {

constexpr int64_t kMostTiles = int64_t{1} << 30;  // the kernels count them in int

struct Call {
    const BlockSelectParams& params;
    const LaunchContext& context;
    Workspace workspace;

    template <class T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(params.workspace) + offset);
    }
    Shortlists shortlists() const {
        return {at<int32_t>(workspace.indices), at<int32_t>(workspace.counts),
                static_cast<int>(workspace.width),
                scan_positions(params.selector, params.problem.group(), params.problem.kv_len),
                static_cast<int>(scan_tiles_per_head(params))};
    }
};

template <class Traits>
Status scan(const Call& call, const typename Traits::Maps& maps = {}) {
    const Workspace& w = call.workspace;
    ScanOutput output = {w.refines,
                         call.params.block_indices,
                         call.params.block_counts,
                         w.width,
                         call.at<uint32_t>(w.scratch),
                         w.capacity,
                         static_cast<int>(scan_tiles_per_head(call.params)),
                         static_cast<int>(scan_items(call.params))};
    if (w.refines) {
        output.indices = call.at<int32_t>(w.indices);
        output.counts = call.at<int32_t>(w.counts);
    }
    return launch(block_scan_kernel<Traits>, "block_scan",
                  {scan_ctas(call.params, call.context.sm_count)}, Traits::kThreads,
                  sizeof(ScanSmem<Traits>), call.context, call.params, output, maps);
}

template <class Traits>
Status refine(const Call& call, const typename Traits::Maps& maps = {}) {
    return launch(block_refine_kernel<Traits>, "block_refine",
                  {refine_ctas(call.params, call.context.sm_count)}, Traits::kThreads,
                  sizeof(RefinedSmem<Traits>), call.context, call.params, call.shortlists(),
                  call.at<uint32_t>(call.workspace.scratch),
                  static_cast<int>(all_tiles(call.params.problem)), maps);
}

template <class Traits>
Status estimate(const Call& call) {
    if (!call.params.omitted_mass_estimate) return {};
    return launch(block_estimate_kernel<Traits>, "block_estimate", {all_tiles(call.params.problem)},
                  Traits::kThreads, sizeof(RefinedSmem<Traits>), call.context, call.params,
                  call.shortlists());
}

// Of a single query's shortlists, whatever scanned.
template <class T, int kDim>
Status refine_by_keys(const Call& call) {
    using Traits = RefineTraits<T, kDim, /*kKeys=*/true>;
    Status status = refine<Traits>(call);
    return status.ok() ? estimate<Traits>(call) : status;
}

// `choose(call)` starts the stages of an element type.
template <class Choose>
Status select(const BlockSelectParams& params, const LaunchContext& context, Choose&& choose) {
    const int64_t tiles = all_tiles(params.problem);
    if (tiles > kMostTiles) return unsupported("block_select", "tiles", tiles, kMostTiles);
    return choose(Call{params, context, Workspace(params, context.sm_count)});
}

}  // namespace condensate::kernels::block_select
