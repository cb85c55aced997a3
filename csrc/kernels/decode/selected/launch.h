// Sizes, workspace and launch of the kernel that selects.
#pragma once

#include "device/element.h"
#include "kernels/decode/selected/kernel.h"
#include "kernels/launch.h"

namespace condensate::kernels::decode {

// Is a group's scratch in shared memory worth CTAs that an SM then lacks?
constexpr int64_t kUnitScoresInSmemBytes = 40 * 1024;

inline Sizes sizes_of(const DecodeParams& p) {
    const int64_t capacity = p.cache.capacity();
    const int pool = pool_keys(p.cache.page_size, p.cache.block_table != nullptr);
    const int64_t listed = p.mode == DecodeMode::kGivenTokens ? p.topk : p.shortlist;
    const int64_t recent = min_i64(p.window, capacity) + pool;
    const int64_t runs = ceil_div(min_i64(p.anchors, capacity), kUnitKeys) +
                         ceil_div(min_i64(listed, capacity), kUnitKeys) +
                         ceil_div(recent, kUnitKeys) + 4;  // runs that are cut at either end
    Sizes sizes;
    sizes.group = p.group();
    sizes.head_dim = static_cast<int32_t>(p.head_dim);
    sizes.slots_per_cta = static_cast<int32_t>(ceil_div(runs, kGroupCtas) * kUnitKeys);
    sizes.units_per_cta =
        static_cast<int32_t>(ceil_div(ceil_div(capacity / kUnitKeys, kGroupCtas), 16) * 16);
    sizes.unit_scores_in_smem = sizes.unit_scores_bytes() <= kUnitScoresInSmemBytes;
    return sizes;
}

struct Shape {
    bool cluster = false;
    int64_t groups = 0;
};

template <class Config>
Status shape_of(const DecodeParams& p, const Sizes& sizes, const LaunchContext& context,
                Shape* shape) {
    const auto kernel = decode_selected_kernel<Config>;
    const int64_t smem_bytes = SmemArrays::bytes(sizes);
    Status status = allow_shared_memory(kernel, "decode_selected", smem_bytes, context);
    if (!status.ok()) return status;
    const int64_t items = p.batch * p.kv_heads * p.query_len;
    if (context.sm_major >= 9) {
        status = allow_large_clusters(kernel, "decode_selected");
        if (!status.ok()) return status;
        *shape = {true, items};
        return {};
    }
    int per_sm = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_sm, kernel, kThreads, static_cast<size_t>(smem_bytes));
    if (error != cudaSuccess) return cuda_status(error, "decode_selected");
    *shape = {false, min_i64(items, max_i64(per_sm * context.sm_count / kGroupCtas, 1))};
    return {};
}

template <class Config>
struct Selected {
    static Status workspace_bytes(const DecodeParams& p, const LaunchContext& context,
                                  int64_t* bytes) {
        const Sizes sizes = sizes_of(p);
        Shape shape;
        const Status status = shape_of<Config>(p, sizes, context, &shape);
        *bytes = shape.groups * (sizes.workspace_bytes() + 128);
        return status;
    }
    static Status run(const DecodeParams& p, const LaunchContext& context) {
        const Sizes sizes = sizes_of(p);
        Shape shape;
        Status status = shape_of<Config>(p, sizes, context, &shape);
        if (!status.ok()) return status;
        auto* workspace = static_cast<uint8_t*>(p.workspace);
        uint32_t* counters = nullptr;
        if (!shape.cluster) {
            counters =
                reinterpret_cast<uint32_t*>(workspace + shape.groups * sizes.workspace_bytes());
            const cudaError_t error = cudaMemsetAsync(
                counters, 0, static_cast<size_t>(shape.groups) * sizeof(uint32_t), context.stream);
            if (error != cudaSuccess) return cuda_status(error, "decode_selected");
        }
        Grid grid{shape.groups * kGroupCtas};
        grid.cluster = shape.cluster ? kGroupCtas : 1;
        grid.cooperative = !shape.cluster;
        return launch(decode_selected_kernel<Config>, "decode_selected", grid, kThreads,
                      SmemArrays::bytes(sizes), context, p, sizes, workspace, counters,
                      context.error_word);
    }
};

// Calls body(Config) for the call's head_dim and group.
template <class T, class CacheT, class Body>
Status with_config(const DecodeParams& p, Body&& body) {
    const bool wide = p.group() > 8;
    switch (p.head_dim) {
        case 64:
            return wide ? body(Config<T, CacheT, 64, 2>{}) : body(Config<T, CacheT, 64, 1>{});
        case 96:
            return wide ? body(Config<T, CacheT, 96, 2>{}) : body(Config<T, CacheT, 96, 1>{});
        case 128:
            return wide ? body(Config<T, CacheT, 128, 2>{}) : body(Config<T, CacheT, 128, 1>{});
        default:
            return wide ? body(Config<T, CacheT, 256, 2>{}) : body(Config<T, CacheT, 256, 1>{});
    }
}

// One instantiation a file.
template <class T, class CacheT>
Status selected_workspace_bytes(const DecodeParams& p, const LaunchContext& context,
                                int64_t* bytes);
template <class T, class CacheT>
Status run_selected(const DecodeParams& p, const LaunchContext& context);

#define CONDENSATE_DECODE_SELECTED(T, CacheT)                                                  \
    template <>                                                                                \
    Status selected_workspace_bytes<T, CacheT>(const DecodeParams& p,                          \
                                               const LaunchContext& context, int64_t* bytes) { \
        return with_config<T, CacheT>(p, [&](auto config) {                                    \
            return Selected<decltype(config)>::workspace_bytes(p, context, bytes);             \
        });                                                                                    \
    }                                                                                          \
    template <>                                                                                \
    Status run_selected<T, CacheT>(const DecodeParams& p, const LaunchContext& context) {      \
        return with_config<T, CacheT>(                                                         \
            p, [&](auto config) { return Selected<decltype(config)>::run(p, context); });      \
    }

}  // namespace condensate::kernels::decode
