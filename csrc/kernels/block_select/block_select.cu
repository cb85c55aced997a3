// Chooses the instantiations: element type, padded dimension, selector, rows.
#include "kernels/block_select/estimate.h"
#include "kernels/block_select/refine.h"
#include "kernels/block_select/scan.h"
#include "kernels/block_select/workspace.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

using namespace block_select;

constexpr int64_t kMostTiles = int64_t{1} << 30;  // the kernels count them in int

struct Call {
    const BlockSelectParams& params;
    const LaunchContext& context;
    Workspace workspace;

    int tiles_per_head() const {
        const Problem& p = params.problem;
        return static_cast<int>(num_tiles(p.query_len, p.group()));
    }
    // Of `most` persistent CTAs as many as can be resident at once.
    int64_t resident(int64_t most, int64_t smem_bytes) const {
        constexpr int64_t kReserved =
            1024;  // bytes of shared memory that the system takes of a CTA
        int64_t per_sm =
            max_i64((context.max_smem_per_block_bytes + kReserved) / (smem_bytes + kReserved), 1);
        return min_i64(most, per_sm * context.sm_count);
    }
    template <class T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(params.workspace) + offset);
    }
};

template <class T, int kDim, Selector kSelector>
Status scan(const Call& call) {
    using Traits = ScanTraits<T, kDim, kSelector>;
    const Workspace& w = call.workspace;
    ScanOutput output = {call.params.block_indices,
                         call.params.block_counts,
                         w.width,
                         call.at<uint32_t>(w.scratch),
                         w.capacity,
                         call.tiles_per_head(),
                         static_cast<int>(scan_items(call.params.problem))};
    if (Traits::kShortlists) {
        output.indices = call.at<int32_t>(w.indices);
        output.counts = call.at<int32_t>(w.counts);
    }
    constexpr int64_t kSmemBytes = sizeof(ScanSmem<Traits>);
    int64_t ctas = call.resident(scan_ctas(call.params, call.context.sm_count), kSmemBytes);
    return launch(block_scan_kernel<Traits>, "block_scan_sm80", {ctas}, kThreads, kSmemBytes,
                  call.context, call.params, output);
}

template <class T, int kDim, int kMTiles>
Status refine(const Call& call) {
    using Traits = RowTraits<T, kDim, kMTiles>;
    const Workspace& w = call.workspace;
    const int64_t tiles = all_tiles(call.params.problem);
    const Shortlists shortlists = {call.at<int32_t>(w.indices), call.at<int32_t>(w.counts),
                                   static_cast<int>(w.width)};
    constexpr int64_t kSmemBytes = sizeof(RefinedSmem<Traits>);
    int64_t ctas = call.resident(refine_ctas(call.params, call.context.sm_count), kSmemBytes);
    Status status = launch(block_refine_kernel<Traits>, "block_refine_sm80", {ctas}, kThreads,
                           kSmemBytes, call.context, call.params, shortlists,
                           call.at<uint32_t>(w.scratch), static_cast<int>(tiles));
    if (!status.ok() || !call.params.omitted_mass_estimate) return status;
    return launch(block_estimate_kernel<Traits>, "block_estimate_sm80", {tiles}, kThreads,
                  kSmemBytes, call.context, call.params, shortlists);
}

template <class T, int kDim>
Status scan_and_refine(const Call& call) {
    Status status = scan<T, kDim, Selector::kBlock>(call);
    if (!status.ok()) return status;
    const Problem& p = call.params.problem;
    int64_t rows = min_i64(tile_positions(p.group()), p.query_len) * p.group();
    return rows > 64 ? refine<T, kDim, 2>(call) : refine<T, kDim, 1>(call);
}

template <class T, int kDim>
Status choose_selector(const Call& call) {
    switch (call.params.selector) {
        case Selector::kQuest:
            return scan<T, kDim, Selector::kQuest>(call);
        case Selector::kMean:
            return scan<T, kDim, Selector::kMean>(call);
        default:
            return scan_and_refine<T, kDim>(call);
    }
}

template <class T>
Status choose_dim(const Call& call) {
    int dim = summary_dim(call.params.selector, static_cast<int>(call.params.problem.head_dim));
    if (dim <= 64) return choose_selector<T, 64>(call);
    if (dim <= 128) return choose_selector<T, 128>(call);
    return choose_selector<T, 256>(call);
}

}  // namespace

int64_t block_select_sm80_workspace_bytes(const BlockSelectParams& params, int sm_count) {
    return Workspace(params, sm_count).bytes;
}

Status block_select_sm80(const BlockSelectParams& params, const LaunchContext& context) {
    const int64_t tiles = all_tiles(params.problem);
    if (tiles > kMostTiles) return unsupported("block_select_sm80", "tiles", tiles, kMostTiles);
    const Call call = {params, context, Workspace(params, context.sm_count)};
    return params.problem.dtype == DType::kFloat16 ? choose_dim<__half>(call)
                                                   : choose_dim<__nv_bfloat16>(call);
}

}  // namespace condensate::kernels
