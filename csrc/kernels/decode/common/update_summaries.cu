// Makes the 8-bit summaries anew that the last keys of every sequence touch. Bound by memory: a
// warp takes the keys or the values of one pool, copies them to shared memory all at once, and
// writes the rows of the pool's touched units or the row of the pool. condensate/decode.h has the
// order of operations.
#include "condensate/decode.h"
#include "device/element.h"
#include "device/float8.h"
#include "kernels/launch.h"
#include "ptx/cp_async.h"
#include "ptx/matrix.h"

namespace condensate::kernels {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float cached_float(__half x) { return to_float(x); }
__device__ __forceinline__ float cached_float(__nv_bfloat16 x) { return to_float(x); }
__device__ __forceinline__ float cached_float(device::Float8 x) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3)));
}

template <class T_, int kDim_>
struct SummaryTraits {
    using T = T_;
    static constexpr int kDim = kDim_;
    static constexpr int kElems = kDim == 96 ? 4 : kDim / 32;  // channels of a lane
    static constexpr int kLanes = kDim / kElems;               // lanes that have some
    static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
    static constexpr int kWarpBytes = kPoolKeys * kRowBytes;
    static constexpr int kWarps = kWarpBytes > 16384 ? 2 : 4;
    static constexpr int kThreads = 32 * kWarps;
};

// Pools of a page, and which of a sequence's an update touches.
struct Pools {
    int page_size;
    int keys;      // of a pool, at most
    int per_page;  // the last may be shorter

    explicit Pools(const KvCache& cache)
        : page_size(static_cast<int>(min_i64(cache.page_size, INT32_MAX))),
          keys(pool_keys(cache.page_size, cache.block_table != nullptr)),
          per_page(static_cast<int>(ceil_div(cache.page_size, keys))) {}

    __device__ int of_key(uint32_t key) const {
        const uint32_t column = key / page_size, slot = key - column * page_size;
        return static_cast<int>(column * per_page + slot / keys);
    }
    // At most, of a sequence.
    int64_t touched(const UpdateSummariesParams& params) const {
        const int64_t short_pools = page_size % keys ? params.appended / page_size + 1 : 0;
        return min_i64(ceil_div(params.appended, keys) + 1 + short_pools,
                       params.cache.max_pages * per_page);
    }
};

// What a warp works on: keys [begin, end) of a page, those of one pool that the sequence has.
struct PoolWork {
    int64_t page;
    int begin, end;     // slots
    int first_touched;  // slot; units before it are left alone
    int pool;           // of the page
    bool values;
    bool exists = false;

    // The pool at `place`, counted from the first touched one.
    __device__ PoolWork(const UpdateSummariesParams& params, const Pools& pools, int place,
                        uint32_t* error_word) {
        const KvCache& cache = params.cache;
        const int length = __ldg(cache.lengths + blockIdx.z);
        const int keys = static_cast<int>(max_i64(min_i64(length, cache.capacity()), 0));
        if (keys != length && (threadIdx.x & 31) == 0) atomicOr(error_word, kErrorCacheLength);
        const int first_key = static_cast<int>(max_i64(keys - params.appended, 0));
        if (first_key >= keys) return;
        const int index = pools.of_key(first_key) + place;
        if (index > pools.of_key(keys - 1)) return;
        const int column = index / pools.per_page, page_begin = column * pools.page_size;
        pool = index - column * pools.per_page;
        begin = pool * pools.keys;
        end = min(min(begin + pools.keys, pools.page_size), keys - page_begin);
        first_touched = max(first_key - page_begin, begin);
        values = blockIdx.y >= params.kv_heads;
        page = cache.block_table ? __ldg(cache.block_table + blockIdx.z * cache.max_pages + column)
                                 : int64_t{blockIdx.z};
        exists = page >= 0 && page < cache.num_pages;
        if (!exists && (threadIdx.x & 31) == 0) atomicOr(error_word, kErrorBlockTable);
    }
};

// Rounds a mean row to 8 bits and stores it.
template <class Traits>
__device__ __forceinline__ void store_row(const float (&x)[Traits::kElems], int8_t* row,
                                          float* scale) {
    const int lane = threadIdx.x & 31;
    float largest = 0.0f;
    bool finite = true;
#pragma unroll
    for (int e = 0; e < Traits::kElems; ++e) {
        largest = fmaxf(largest, fabsf(x[e]));
        finite &= fabsf(x[e]) <= 3.402823466e38f;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    finite = __all_sync(kAllLanes, finite);
    constexpr float kLevels = kSummaryLevels;
    const float inverse = __fdiv_rn(kLevels, largest);
    const bool zero = !finite || inverse == INFINITY;
    Vec<int8_t, Traits::kElems> entries;
#pragma unroll
    for (int e = 0; e < Traits::kElems; ++e)
        entries.elem[e] =
            zero ? int8_t{0} : static_cast<int8_t>(__float2int_rn(__fmul_rn(x[e], inverse)));
    if (lane < Traits::kLanes) reinterpret_cast<Vec<int8_t, Traits::kElems>*>(row)[lane] = entries;
    if (lane == 0)
        *scale = !finite ? __int_as_float(0x7fc00000) : zero ? 0.0f : __fdiv_rn(largest, kLevels);
}

// Starts copying `count` rows, which `stride` elements part, to shared memory.
template <class Traits>
__device__ __forceinline__ void copy_rows(uint32_t rows_smem, const typename Traits::T* rows_gmem,
                                          int64_t stride, int count) {
    constexpr int kChunks = Traits::kRowBytes / 16;
#pragma unroll 8
    for (int i = threadIdx.x & 31; i < count * kChunks; i += 32) {
        const int row = i / kChunks, chunk = i % kChunks;
        const char* src = reinterpret_cast<const char*>(rows_gmem + row * stride) + 16 * chunk;
        ptx::cp_async_16(rows_smem + row * Traits::kRowBytes + 16 * chunk, src, true);
    }
}

// x = mean of `count` rows, added up by units, times the cache's scale.
template <class Traits>
__device__ __forceinline__ void average(float (&x)[Traits::kElems], const char* rows, int count,
                                        float cache_scale) {
    using Chunk = Vec<typename Traits::T, Traits::kElems>;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int e = 0; e < Traits::kElems; ++e) x[e] = 0.0f;
    if (lane >= Traits::kLanes) return;
    for (int unit = 0; unit < count; unit += kUnitKeys) {
        float sum[Traits::kElems] = {};
#pragma unroll
        for (int j = 0; j < kUnitKeys; ++j) {
            if (unit + j >= count) continue;
            const auto row =
                reinterpret_cast<const Chunk*>(rows + (unit + j) * Traits::kRowBytes)[lane];
#pragma unroll
            for (int e = 0; e < Traits::kElems; ++e)
                sum[e] = __fadd_rn(sum[e], cached_float(row.elem[e]));
        }
#pragma unroll
        for (int e = 0; e < Traits::kElems; ++e) x[e] = __fadd_rn(x[e], sum[e]);
    }
#pragma unroll
    for (int e = 0; e < Traits::kElems; ++e)
        x[e] = __fmul_rn(__fdiv_rn(x[e], static_cast<float>(count)), cache_scale);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    update_summaries_kernel(const __grid_constant__ UpdateSummariesParams params,
                            const __grid_constant__ Pools pools, uint32_t* error_word) {
    using T = typename Traits::T;
    extern __shared__ __align__(128) char smem_bytes[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const PoolWork work(params, pools, static_cast<int>(blockIdx.x) * Traits::kWarps + warp,
                        error_word);
    if (!work.exists) return;
    const KvCache& cache = params.cache;
    const KvSummaries& summaries = params.summaries;
    const int head = static_cast<int>(blockIdx.y % params.kv_heads);
    const T* rows_gmem =
        work.values ? static_cast<const T*>(cache.value) + work.page * cache.value_stride_page +
                          head * cache.value_stride_head
                    : static_cast<const T*>(cache.key) + work.page * cache.key_stride_page +
                          head * cache.key_stride_head;
    const int64_t stride = work.values ? cache.value_stride_token : cache.key_stride_token;
    // A pool's row needs all its keys; a unit's all of the unit.
    const int first = work.values ? work.begin : work.first_touched / kUnitKeys * kUnitKeys;
    char* rows = smem_bytes + warp * Traits::kWarpBytes;
    copy_rows<Traits>(ptx::smem_address(rows), rows_gmem + first * stride, stride,
                      work.end - first);
    ptx::cp_async_commit();

    const float* scales = work.values ? cache.value_scale : cache.key_scale;
    const float cache_scale = scales ? scales[head] : 1.0f;
    int8_t* record_rows =
        summaries.rows + work.page * summaries.rows_stride_page + head * summaries.rows_stride_head;
    float* record_scales = summaries.scales + work.page * summaries.scales_stride_page +
                           head * summaries.scales_stride_head;
    ptx::cp_async_wait<0>();
    __syncwarp();  // the rows have landed
    float x[Traits::kElems];
    if (work.values) {
        const int64_t row = unit_rows(cache.page_size) + work.pool;
        average<Traits>(x, rows, work.end - first, cache_scale);
        store_row<Traits>(x, record_rows + row * Traits::kDim, record_scales + row);
        return;
    }
    float center[Traits::kElems] = {};
    if (summaries.key_center && lane < Traits::kLanes) {
#pragma unroll
        for (int e = 0; e < Traits::kElems; ++e)
            center[e] = summaries.key_center[head * Traits::kDim + lane * Traits::kElems + e];
    }
    for (int slot = first; slot < work.end; slot += kUnitKeys) {
        const int64_t row = slot / kUnitKeys;
        average<Traits>(x, rows + (slot - first) * Traits::kRowBytes,
                        min(work.end - slot, kUnitKeys), cache_scale);
#pragma unroll
        for (int e = 0; e < Traits::kElems; ++e) x[e] = __fsub_rn(x[e], center[e]);
        store_row<Traits>(x, record_rows + row * Traits::kDim, record_scales + row);
    }
}

template <class T, int kDim>
Status launch_update(const UpdateSummariesParams& params, const LaunchContext& context) {
    using Traits = SummaryTraits<T, kDim>;
    const Pools pools(params.cache);
    const Grid grid = {ceil_div(pools.touched(params), Traits::kWarps), 2 * params.kv_heads,
                       params.batch};
    return launch(update_summaries_kernel<Traits>, "update_summaries", grid, Traits::kThreads,
                  Traits::kWarps * Traits::kWarpBytes, context, params, pools, context.error_word);
}

template <class T>
Status choose_dim(const UpdateSummariesParams& params, const LaunchContext& context) {
    switch (params.head_dim) {
        case 64:
            return launch_update<T, 64>(params, context);
        case 96:
            return launch_update<T, 96>(params, context);
        case 128:
            return launch_update<T, 128>(params, context);
        case 256:
            return launch_update<T, 256>(params, context);
    }
    return unsupported("update_summaries", "head_dim", params.head_dim, 256);
}

}  // namespace

Status update_summaries(const UpdateSummariesParams& params, const LaunchContext& context) {
    if (params.appended <= 0) return {};
    switch (params.cache.dtype) {
        case DType::kFloat16:
            return choose_dim<__half>(params, context);
        case DType::kFloat8E4M3:
            return choose_dim<device::Float8>(params, context);
        default:
            return choose_dim<__nv_bfloat16>(params, context);
    }
}

}  // namespace condensate::kernels
