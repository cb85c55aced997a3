// Sizes, workspace and launches of a step that selects, or attends given tokens.
#pragma once

#include "kernels/decode/kernels.h"
#include "kernels/decode/selected/attend.h"
#include "kernels/decode/selected/score.h"
#include "kernels/launch.h"

namespace condensate::kernels::decode {

inline Sizes sizes_of(const DecodeParams& p) {
    const int64_t capacity = p.cache.capacity();
    const bool paged = p.cache.block_table != nullptr;
    const int pool = pool_keys(p.cache.page_size, paged);
    const bool given = p.mode == DecodeMode::kGivenTokens;
    const int64_t ranges = min_i64(p.anchors, capacity) + min_i64(p.window, capacity) + pool;
    const int64_t listed = min_i64(given ? p.topk : p.shortlist, capacity);
    // Runs of 8 that are cut at either end of anchors, list and recent keys.
    const int64_t slots =
        (ceil_div(ranges, kUnitKeys) + ceil_div(listed, kUnitKeys) + 6) * kUnitKeys;
    Sizes sizes;
    sizes.group = p.group();
    sizes.head_dim = static_cast<int32_t>(p.head_dim);
    sizes.slots = static_cast<int32_t>(slots);
    sizes.row_slices = static_cast<int32_t>(ceil_div(slots, kSliceRows));
    if (given) {
        sizes.lay_out();
        return sizes;
    }
    sizes.chunks = static_cast<int32_t>(ceil_div(capacity / kUnitKeys, kChunkUnits));
    sizes.pool_slices = static_cast<int32_t>(ceil_div(ceil_div(capacity, pool), kSlicePools));
    sizes.lay_out();
    return sizes;
}

Status make_shortlists(const DecodeParams& p, const Sizes& sizes, const LaunchContext& context);

Status list_rows(const DecodeParams& p, const Sizes& sizes, const LaunchContext& context);

// The headers' counters, which a scan would clear.
inline Status clear_counters(const DecodeParams& p, const Sizes& sizes,
                             const LaunchContext& context) {
    const int64_t items = p.batch * p.kv_heads * p.query_len;
    const cudaError_t error =
        cudaMemset2DAsync(p.workspace, static_cast<size_t>(sizes.record_bytes), 0, sizeof(Header),
                          static_cast<size_t>(items), context.stream);
    return cuda_status(error, "decode_score");
}

template <class T, class CacheT, int kDim, int kHeadTiles>
Status run_kernels(const DecodeParams& p, const LaunchContext& context) {
    const Sizes sizes = sizes_of(p);
    auto* workspace = static_cast<uint8_t*>(p.workspace);
    const int64_t items = p.batch * p.kv_heads * p.query_len;
    Status status;
    if (p.mode == DecodeMode::kGivenTokens) {
        status = clear_counters(p, sizes, context);
    } else {
        Grid grid{max_i64(sizes.chunks, 1), p.batch * p.kv_heads,
                  ceil_div(p.group() * p.query_len, kScanRows)};
        status = launch(decode_scan_kernel<T, CacheT, kDim>, "decode_scan", grid, kScanThreads,
                        sizeof(ScanSmem<kDim>), context, p, sizes, workspace, context.error_word);
        if (status.ok()) status = make_shortlists(p, sizes, context);
    }
    if (!status.ok()) return status;
    Grid scores{sizes.slot_slices(), items};
    status = launch(decode_score_kernel<T, CacheT, kDim, kHeadTiles>, "decode_score", scores,
                    kScoreThreads, sizeof(ScoreSmem<T, kDim>), context, p, sizes, workspace,
                    context.error_word);
    if (status.ok()) status = list_rows(p, sizes, context);
    if (!status.ok() || p.mode == DecodeMode::kSelect) return status;
    Grid values{sizes.slices(), items};
    return launch(decode_attend_kernel<T, CacheT, kDim, kHeadTiles>, "decode_attend", values,
                  kAttendThreads,
                  aligned(sizeof(AttendSmem)) + int64_t{kAttendWarps / 2} * p.group() * kDim * 4,
                  context, p, sizes, workspace, context.error_word);
}

#define CONDENSATE_DECODE_SELECTED(T, CacheT)                                             \
    template <>                                                                           \
    Status run_selected<T, CacheT>(const DecodeParams& p, const LaunchContext& context) { \
        const bool wide = p.group() > 8;                                                  \
        switch (p.head_dim) {                                                             \
            case 64:                                                                      \
                return wide ? run_kernels<T, CacheT, 64, 2>(p, context)                   \
                            : run_kernels<T, CacheT, 64, 1>(p, context);                  \
            case 96:                                                                      \
                return wide ? run_kernels<T, CacheT, 96, 2>(p, context)                   \
                            : run_kernels<T, CacheT, 96, 1>(p, context);                  \
            case 128:                                                                     \
                return wide ? run_kernels<T, CacheT, 128, 2>(p, context)                  \
                            : run_kernels<T, CacheT, 128, 1>(p, context);                 \
            default:                                                                      \
                return wide ? run_kernels<T, CacheT, 256, 2>(p, context)                  \
                            : run_kernels<T, CacheT, 256, 1>(p, context);                 \
        }                                                                                 \
    }

}  // namespace condensate::kernels::decode
