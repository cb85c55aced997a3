// Adds up the means of blocks to pools of the far field, key and value in one launch. Bound by
// memory: a thread owns 16 bytes of channels of a pool and reads its blocks' means once.
#include "kernels/element.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kLoadsInFlight = 8;  // of one thread

struct PoolGrid {
    int64_t threads;
    int64_t pools;        // of a head
    int64_t pool_blocks;  // of a pool
    int chunks;           // threads that share a pool
};

// The thread's chunk, pool, head and tensor.
struct PoolThread {
    int64_t chunk, pool, head, which, flat_pool;

    __device__ PoolThread(int64_t index, const PoolGrid& grid, int64_t heads)
        : chunk(index % grid.chunks),
          pool(index / grid.chunks % grid.pools),
          head(index / grid.chunks / grid.pools % heads),
          which(index / grid.chunks / grid.pools / heads),
          flat_pool(index / grid.chunks) {}
};

// sum += keys * mean for `blocks` blocks of full length.
template <class T, int kElems>
__device__ __forceinline__ void add_blocks(float (&sum)[kElems], const T* means, int64_t stride,
                                           int64_t blocks) {
    using Chunk = Vec<T, kElems>;
    for (int64_t first = 0; first < blocks; first += kLoadsInFlight) {
        Chunk loaded[kLoadsInFlight];  // blocks that do not exist add nothing
#pragma unroll
        for (int j = 0; j < kLoadsInFlight; ++j)
            loaded[j] = first + j < blocks
                            ? *reinterpret_cast<const Chunk*>(means + (first + j) * stride)
                            : Chunk{};
#pragma unroll
        for (int j = 0; j < kLoadsInFlight; ++j)
#pragma unroll
            for (int e = 0; e < kElems; ++e)
                sum[e] = fmaf(static_cast<float>(kBlockKeys), to_float(loaded[j].elem[e]), sum[e]);
    }
}

template <class T, int kElems>
__global__ void __launch_bounds__(kThreads) far_pools_kernel(FarPoolsParams params, PoolGrid grid) {
    using Chunk = Vec<T, kElems>;
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (index >= grid.threads) return;
    const PoolThread t(index, grid, params.batch * params.kv_heads);
    const BlockMeans& blocks = t.which == 0 ? params.key : params.value;
    const int64_t begin = t.pool * grid.pool_blocks;
    const int64_t end = min_i64(begin + grid.pool_blocks, num_blocks(params.kv_len));
    const int64_t full = min_i64(end, params.kv_len / kBlockKeys);  // the last one may be short
    const T* means = static_cast<const T*>(blocks.data) + t.head * blocks.stride_head +
                     begin * blocks.stride_block + t.chunk * kElems;

    float sum[kElems] = {};
    add_blocks<T, kElems>(sum, means, blocks.stride_block, full - begin);
    if (full < end) {
        const Chunk last =
            *reinterpret_cast<const Chunk*>(means + (full - begin) * blocks.stride_block);
        const float keys = static_cast<float>(block_keys(params.kv_len, full));
#pragma unroll
        for (int e = 0; e < kElems; ++e) sum[e] = fmaf(keys, to_float(last.elem[e]), sum[e]);
    }
    const int64_t keys = min_i64(end * kBlockKeys, params.kv_len) - begin * kBlockKeys;
    const int64_t at = t.flat_pool * grid.chunks + t.chunk;
    Chunk mean;
    Vec<float, kElems> sums;
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
        sums.elem[e] = sum[e];
        mean.elem[e] = from_float<T>(sum[e] / static_cast<float>(keys));
    }
    reinterpret_cast<Vec<float, kElems>*>(params.sums)[at] = sums;
    static_cast<Chunk*>(params.means)[at] = mean;
}

template <class T, int kElems>
Status launch_pools(const FarPoolsParams& params, const LaunchContext& context) {
    PoolGrid grid = {};
    grid.pools = num_far_pools(params.kv_len);
    grid.pool_blocks = far_pool_blocks(params.kv_len);
    grid.chunks = static_cast<int>(params.head_dim / kElems);
    grid.threads = 2 * params.batch * params.kv_heads * grid.pools * grid.chunks;
    return launch(far_pools_kernel<T, kElems>, "far_pools", {ceil_div(grid.threads, kThreads)},
                  kThreads, 0, context, params, grid);
}

bool is_wide(const BlockMeans& means, const FarPoolsParams& params) {
    return is_wide_aligned({means.data, 0, means.stride_head, means.stride_block}, params.dtype, 1,
                           params.batch * params.kv_heads, num_blocks(params.kv_len));
}

}  // namespace

Status far_pools_cuda(const FarPoolsParams& params, const LaunchContext& context) {
    return with_element_type(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr int kWide = kWideBytes / static_cast<int>(sizeof(T));
        bool wide = params.head_dim % kWide == 0 && is_wide(params.key, params) &&
                    is_wide(params.value, params) && is_wide_aligned(params.sums) &&
                    is_wide_aligned(params.means);
        return wide ? launch_pools<T, kWide>(params, context) : launch_pools<T, 1>(params, context);
    });
}

}  // namespace condensate::kernels
