// Summarises the keys in one pass over them: what the block selectors score instead of the keys.
// Bound by memory: a thread owns 16 bytes of channels of a unit and reads them key by key.
#include "condensate/kv_view.h"
#include "device/element.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kLoadsInFlight = 4;  // of one thread; divides the keys of quest's and mean's units

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

// The keys of a head; `head` counts [B, Hkv].
template <class T>
__device__ __forceinline__ KvView keys_of(const BlockSummaryParams& params, int64_t head) {
    return KvView::of(params.key, sizeof(T), head / params.kv_heads, head % params.kv_heads);
}

template <class T, int kElems>
__device__ __forceinline__ Vec<T, kElems> load_chunk(const KvView& rows, int64_t key, int chunk) {
    return static_cast<const Vec<T, kElems>*>(rows.row(key, sizeof(T)))[chunk];
}

// Adds keys first..first+keys-1 (at least one) of this thread's channels.
template <class T, int kElems, int kKeys, class Unit>
__device__ void read_unit(Unit& unit, const KvView& rows, int64_t first, int keys, int chunk) {
    using Chunk = Vec<T, kElems>;
    if (keys < kKeys) {  // cut short by the end of the keys
        for (int j = 0; j < keys; ++j)
            unit.add(load_chunk<T, kElems>(rows, first + j, chunk), j == 0);
        return;
    }
#pragma unroll 2
    for (int j0 = 0; j0 < kKeys; j0 += kLoadsInFlight) {
        Chunk loaded[kLoadsInFlight];
#pragma unroll
        for (int j = 0; j < kLoadsInFlight; ++j) {
            loaded[j] = load_chunk<T, kElems>(rows, first + j0 + j, chunk);
        }
#pragma unroll
        for (int j = 0; j < kLoadsInFlight; ++j) unit.add(loaded[j], j0 + j == 0);
    }
}

struct SummaryGrid {
    int64_t units;  // of one head; of `block`, whole blocks
    uint32_t ctas_per_head;
    int chunks;  // threads that share a unit
    int units_per_cta;
};

template <class T, int kElems, int kKeys, class Unit>
__global__ void __launch_bounds__(kThreads)
    block_summary_kernel(BlockSummaryParams params, SummaryGrid grid) {
    using Chunk = Vec<T, kElems>;
    int unit_in_cta = static_cast<int>(threadIdx.x) / grid.chunks;
    int chunk = static_cast<int>(threadIdx.x) % grid.chunks;
    if (unit_in_cta >= grid.units_per_cta) return;
    int64_t head = blockIdx.x / grid.ctas_per_head;  // of all batches
    int64_t index =
        static_cast<int64_t>(blockIdx.x % grid.ctas_per_head) * grid.units_per_cta + unit_in_cta;
    if (index >= grid.units) return;

    Chunk* summaries = static_cast<Chunk*>(params.summaries) +
                       head * grid.units * Unit::kParts * grid.chunks + chunk;
    int64_t left = params.kv_len - index * kKeys;
    int keys = left < kKeys ? static_cast<int>(left) : kKeys;
    Unit unit;
    if (keys > 0) {
        read_unit<T, kElems, kKeys>(unit, keys_of<T>(params, head), index * kKeys, keys, chunk);
    }
#pragma unroll
    for (int i = 0; i < Unit::kParts; ++i) {
        Chunk* to = summaries + (index * Unit::kParts + i) * grid.chunks;
        *to = keys > 0 ? unit.part(i, keys) : Chunk{};
    }
}

// Means of both sizes of unit from one read of the keys. A thread owns its channels of a block.
template <class T, int kElems>
__global__ void __launch_bounds__(kThreads, 2)
    block_levels_kernel(BlockSummaryParams params, SummaryGrid grid) {
    using Chunk = Vec<T, kElems>;
    int block_in_cta = static_cast<int>(threadIdx.x) / grid.chunks;
    int chunk = static_cast<int>(threadIdx.x) % grid.chunks;
    if (block_in_cta >= grid.units_per_cta) return;
    int64_t head = blockIdx.x / grid.ctas_per_head;  // of all batches
    int64_t block =
        static_cast<int64_t>(blockIdx.x % grid.ctas_per_head) * grid.units_per_cta + block_in_cta;
    if (block >= grid.units) return;

    const KvView key_rows = keys_of<T>(params, head);
    constexpr int kRows = 9;  // rows_per_block(kBlock)
    Chunk* rows = static_cast<Chunk*>(params.summaries) +
                  (head * grid.units + block) * kRows * grid.chunks + chunk;
    const int keys = static_cast<int>(min_i64(params.kv_len - block * kBlockKeys, kBlockKeys));
    auto store = [&](UnitLevel level, int unit, const float (&sum)[kElems]) {
        int count = min(max(keys - unit * level.keys, 0), level.keys);
        // A full unit has a power of two of keys: the product is the exact quotient.
        float full = 1.0f / static_cast<float>(level.keys);
        Chunk mean;
#pragma unroll
        for (int e = 0; e < kElems; ++e) {
            float x = count == level.keys ? sum[e] * full
                      : count > 0         ? sum[e] / static_cast<float>(count)
                                          : 0.0f;
            mean.elem[e] = from_float<T>(x);
        }
        rows[(level.first_row + unit) * grid.chunks] = mean;
    };

    constexpr int kUnitKeys = kShortUnits.keys;
    float coarse[kElems] = {};
#pragma unroll 1
    for (int first = 0; first < kBlockKeys; first += kUnitKeys) {
        Chunk loaded[kUnitKeys];  // all in flight; keys that do not exist add nothing
#pragma unroll
        for (int j = 0; j < kUnitKeys; ++j) {
            const int64_t key = block * kBlockKeys + first + j;
            loaded[j] = first + j < keys ? load_chunk<T, kElems>(key_rows, key, chunk) : Chunk{};
        }
        float unit[kElems] = {};
#pragma unroll
        for (int j = 0; j < kUnitKeys; ++j)
#pragma unroll
            for (int e = 0; e < kElems; ++e) unit[e] += to_float(loaded[j].elem[e]);
        store(kShortUnits, first / kUnitKeys, unit);
#pragma unroll
        for (int e = 0; e < kElems; ++e) coarse[e] += unit[e];
    }
    store(kCoarseUnits, 0, coarse);
}

// `units` of a head, a thread for each unit and kElems channels.
template <int kElems>
Status launch_summary(void (*kernel)(BlockSummaryParams, SummaryGrid), int64_t units,
                      const BlockSummaryParams& params, const LaunchContext& context) {
    SummaryGrid grid = {};
    grid.units = units;
    grid.chunks = static_cast<int>(params.head_dim / kElems);
    if (grid.chunks == 0) return {};
    grid.units_per_cta = kThreads / grid.chunks;
    int64_t ctas = ceil_div(units, static_cast<int64_t>(grid.units_per_cta));
    grid.ctas_per_head = static_cast<uint32_t>(ctas);
    return launch(kernel, "block_summary", {ctas * params.batch * params.kv_heads}, kThreads, 0,
                  context, params, grid);
}

template <class T, int kElems>
Status launch_selector(const BlockSummaryParams& params, const LaunchContext& context) {
    const int64_t rows = summary_rows(params.selector, params.kv_len);
    return with_block_selector<Status>(params.selector, [&](auto constant) {
        constexpr Selector kSelector = decltype(constant)::kSelector;
        constexpr int kKeys = scan_levels(kSelector).mass.keys;
        if constexpr (has_two_levels(kSelector)) {
            return launch_summary<kElems>(block_levels_kernel<T, kElems>, num_blocks(params.kv_len),
                                          params, context);
        } else if constexpr (selector_traits(kSelector).content == UnitContent::kBounds) {
            return launch_summary<kElems>(
                block_summary_kernel<T, kElems, kKeys, BoundsUnit<T, kElems>>, rows, params,
                context);
        } else {
            return launch_summary<kElems>(
                block_summary_kernel<T, kElems, kKeys, MeanUnit<T, kElems, kKeys>>, rows, params,
                context);
        }
    });
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
