// Adds up the means of blocks to pools of the far field, key and value in one launch. Bound by
// memory: a thread owns 16 bytes of channels of a pool and reads its blocks' means once.
#include "device/element.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

constexpr int kThreads = 256;

struct PoolGrid {
    int64_t threads;
    int64_t pools;        // of a head
    int64_t pool_blocks;  // of a pool
    int64_t pool_sums;    // of a pool, running
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

// sum += keys * mean of `blocks` consecutive blocks, at most kFarSumBlocks; all loads are in
// flight. Blocks that are not there have no keys.
template <class T, int kElems, class KeysOf>
__device__ __forceinline__ void add_blocks(float (&sum)[kElems], const T* means, int64_t stride,
                                           int blocks, KeysOf&& keys_of) {
    using Chunk = Vec<T, kElems>;
    Chunk loaded[kFarSumBlocks];
#pragma unroll
    for (int j = 0; j < kFarSumBlocks; ++j)
        loaded[j] = j < blocks ? *reinterpret_cast<const Chunk*>(means + j * stride) : Chunk{};
#pragma unroll
    for (int j = 0; j < kFarSumBlocks; ++j) {
        const float keys = static_cast<float>(keys_of(j));
#pragma unroll
        for (int e = 0; e < kElems; ++e) sum[e] = fmaf(keys, to_float(loaded[j].elem[e]), sum[e]);
    }
}

template <class T, int kElems>
__global__ void __launch_bounds__(kThreads)
    far_pools_kernel(const __grid_constant__ FarPoolsParams params,
                     const __grid_constant__ PoolGrid grid) {
    using Chunk = Vec<T, kElems>;
    using Sums = Vec<float, kElems>;
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (index >= grid.threads) return;
    const PoolThread t(index, grid, params.batch * params.kv_heads);
    const BlockMeans& blocks = t.which == 0 ? params.key : params.value;
    const int64_t begin = t.pool * grid.pool_blocks;
    const int64_t end = min_i64(begin + grid.pool_blocks, num_blocks(params.kv_len));
    const T* means =
        static_cast<const T*>(blocks.data) + t.head * blocks.stride_head + t.chunk * kElems;
    Sums* sums =
        reinterpret_cast<Sums*>(params.sums) + t.flat_pool * grid.pool_sums * grid.chunks + t.chunk;

    Sums sum = {};
    for (int64_t n = 0; n < grid.pool_sums; ++n) {
        const int64_t first = begin + n * kFarSumBlocks;
        const int count = static_cast<int>(max_i64(min_i64(end - first, kFarSumBlocks), 0));
        add_blocks<T, kElems>(sum.elem, means + first * blocks.stride_block, blocks.stride_block,
                              count, [&](int j) { return block_keys(params.kv_len, first + j); });
        sums[n * grid.chunks] = sum;
    }
    const int64_t keys = min_i64(end * kBlockKeys, params.kv_len) - begin * kBlockKeys;
    Chunk mean;
#pragma unroll
    for (int e = 0; e < kElems; ++e)
        mean.elem[e] = from_float<T>(sum.elem[e] / static_cast<float>(keys));
    static_cast<Chunk*>(params.means)[t.flat_pool * grid.chunks + t.chunk] = mean;
}

template <class T, int kElems>
Status launch_pools(const FarPoolsParams& params, const LaunchContext& context) {
    PoolGrid grid = {};
    grid.pools = num_far_pools(params.kv_len);
    grid.pool_blocks = far_pool_blocks(params.kv_len);
    grid.pool_sums = far_pool_sums(params.kv_len);
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
