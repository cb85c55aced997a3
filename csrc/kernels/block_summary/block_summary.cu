// Summarises the keys in one pass over them: what the block selectors score instead of the keys.
// Bound by memory: a thread owns 16 bytes of channels of a unit and reads them key by key.
#include "kernels/element.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kLoadsInFlight = 4;  // of one thread; divides the keys of every kind of unit

// Maximum and minimum that keep NaN, which fmaxf and fminf drop.
__device__ __forceinline__ float max_nan(float a, float b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ float min_nan(float a, float b) { return b < a || b != b ? b : a; }
__device__ __forceinline__ __half max_nan(__half a, __half b) { return __hmax_nan(a, b); }
__device__ __forceinline__ __half min_nan(__half a, __half b) { return __hmin_nan(a, b); }
__device__ __forceinline__ __nv_bfloat16 max_nan(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __hmax_nan(a, b);
}
__device__ __forceinline__ __nv_bfloat16 min_nan(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __hmin_nan(a, b);
}

// Mean over the keys of a unit, summed in float32.
template <class T, int kElems, int kKeys>
struct MeanUnit {
    static constexpr int kParts = 1;  // vectors that a unit stores
    float sum[kElems] = {};

    __device__ void add(const Vec<T, kElems>& key, bool /*first*/) {
#pragma unroll
        for (int e = 0; e < kElems; ++e) sum[e] += to_float(key.elem[e]);
    }
    __device__ Vec<T, kElems> part(int /*index*/, int keys) const {
        Vec<T, kElems> mean;
#pragma unroll
        for (int e = 0; e < kElems; ++e) {
            // A full unit has a power of two of keys: the product is the exact quotient.
            float x = keys == kKeys ? sum[e] * (1.0f / kKeys) : sum[e] / static_cast<float>(keys);
            mean.elem[e] = from_float<T>(x);
        }
        return mean;
    }
};

// Elementwise maximum, then minimum, over the keys of a unit.
template <class T, int kElems>
struct BoundsUnit {
    static constexpr int kParts = 2;
    Vec<T, kElems> high;
    Vec<T, kElems> low;

    __device__ void add(const Vec<T, kElems>& key, bool first) {
        if (first) {
            high = key;
            low = key;
            return;
        }
#pragma unroll
        for (int e = 0; e < kElems; ++e) {
            high.elem[e] = max_nan(high.elem[e], key.elem[e]);
            low.elem[e] = min_nan(low.elem[e], key.elem[e]);
        }
    }
    __device__ Vec<T, kElems> part(int index, int /*keys*/) const {
        return index == 0 ? high : low;
    }
};

// Adds keys first..first+keys-1 (at least one) of this thread's channels.
template <class T, int kElems, int kKeys, class Unit>
__device__ void read_unit(Unit& unit, const T* channels, int64_t stride_seq, int keys) {
    using Chunk = Vec<T, kElems>;
    if (keys < kKeys) {  // cut short by the end of the keys
        for (int j = 0; j < keys; ++j) {
            unit.add(*reinterpret_cast<const Chunk*>(channels + j * stride_seq), j == 0);
        }
        return;
    }
#pragma unroll 2
    for (int j0 = 0; j0 < kKeys; j0 += kLoadsInFlight) {
        Chunk loaded[kLoadsInFlight];
#pragma unroll
        for (int j = 0; j < kLoadsInFlight; ++j) {
            loaded[j] = *reinterpret_cast<const Chunk*>(channels + (j0 + j) * stride_seq);
        }
#pragma unroll
        for (int j = 0; j < kLoadsInFlight; ++j) unit.add(loaded[j], j0 + j == 0);
    }
}

struct SummaryGrid {
    int64_t units;  // of one head
    uint32_t ctas_per_head;
    int chunks;          // threads that share a unit
    int units_per_pass;  // units that a CTA reads at once
};

template <class T, int kElems, int kKeys, int kPasses, class Unit>
__global__ void __launch_bounds__(kThreads)
    block_summary_kernel(BlockSummaryParams params, SummaryGrid grid) {
    using Chunk = Vec<T, kElems>;
    int unit_in_pass = static_cast<int>(threadIdx.x) / grid.chunks;
    int chunk = static_cast<int>(threadIdx.x) % grid.chunks;
    if (unit_in_pass >= grid.units_per_pass) return;
    int64_t head = blockIdx.x / grid.ctas_per_head;  // of all batches
    int64_t first_unit =
        static_cast<int64_t>(blockIdx.x % grid.ctas_per_head) * grid.units_per_pass * kPasses;

    const T* key = static_cast<const T*>(params.key.data) +
                   head / params.kv_heads * params.key.stride_batch +
                   head % params.kv_heads * params.key.stride_head + chunk * kElems;
    Chunk* summaries = static_cast<Chunk*>(params.summaries) +
                       head * grid.units * Unit::kParts * grid.chunks + chunk;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        int64_t index = first_unit + pass * grid.units_per_pass + unit_in_pass;
        if (index >= grid.units) return;
        int64_t left = params.kv_len - index * kKeys;
        int keys = left < kKeys ? static_cast<int>(left) : kKeys;
        Unit unit;
        if (keys > 0) {
            read_unit<T, kElems, kKeys>(unit, key + index * kKeys * params.key.stride_seq,
                                        params.key.stride_seq, keys);
        }
#pragma unroll
        for (int i = 0; i < Unit::kParts; ++i) {
            Chunk* to = summaries + (index * Unit::kParts + i) * grid.chunks;
            *to = keys > 0 ? unit.part(i, keys) : Chunk{};
        }
    }
}

template <class T, int kElems, int kKeys, int kPasses, class Unit>
Status launch_summary(const BlockSummaryParams& params, const LaunchContext& context) {
    SummaryGrid grid = {};
    grid.units = summary_units(params.selector, params.kv_len);
    grid.chunks = static_cast<int>(params.head_dim / kElems);
    if (grid.chunks == 0) return {};
    grid.units_per_pass = kThreads / grid.chunks;
    int64_t ctas = ceil_div(grid.units, static_cast<int64_t>(grid.units_per_pass) * kPasses);
    grid.ctas_per_head = static_cast<uint32_t>(ctas);
    return launch(block_summary_kernel<T, kElems, kKeys, kPasses, Unit>, "block_summary",
                  {ctas * params.batch * params.kv_heads}, kThreads, 0, context, params, grid);
}

template <class T, int kElems>
Status launch_selector(const BlockSummaryParams& params, const LaunchContext& context) {
    // Units of 4 keys are little work for a thread: it takes several where accesses are wide.
    constexpr int kPasses = kElems > 1 ? 4 : 1;
    if (params.selector == Selector::kBlock) {
        return launch_summary<T, kElems, 4, kPasses, MeanUnit<T, kElems, 4>>(params, context);
    }
    if (params.selector == Selector::kQuest) {
        return launch_summary<T, kElems, 16, 1, BoundsUnit<T, kElems>>(params, context);
    }
    return launch_summary<T, kElems, kBlockKeys, 1, MeanUnit<T, kElems, kBlockKeys>>(params,
                                                                                     context);
}

}  // namespace

Status block_summary(const BlockSummaryParams& params, const LaunchContext& context) {
    return with_element_type(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        bool wide = is_wide_aligned(params.key, params.dtype, params.batch, params.kv_heads,
                                    params.kv_len) &&
                    is_wide_aligned(params.summaries);
        return wide ? launch_selector<T, kWideBytes / static_cast<int>(sizeof(T))>(params, context)
                    : launch_selector<T, 1>(params, context);
    });
}

}  // namespace condensate::kernels
