// The far field's pooled rows: what a tile leaves of each pool. The pools that its walk visits no
// block of, and that far_end does not cut, are the premade means; the others are made here.
//
// Arithmetic is float32. What is left of a pool is its sum less the walked blocks. Of the pool that
// far_end cuts, and of channels where that difference is not finite, the condensed blocks are added
// up instead: nothing of a later key may enter, and no infinity of a walked one.
#pragma once

#include <cstdint>

#include "condensate/far_field.h"
#include "condensate/params.h"
#include "device/pack.h"
#include "device/tile_walk.h"

namespace condensate::device {

// The pools of one tile. Blocks fit int as in BlockWalk.
struct FarTile {
    int64_t kv_len;
    int blocks;     // of all keys
    int end;        // blocks that every row sees: far_end()
    int log2_pool;  // blocks of a pool

    __device__ FarTile(const Ranges& ranges, TileSpan span, int log2_pool_blocks)
        : kv_len(ranges.kv_len),
          blocks(static_cast<int>(num_blocks(ranges.kv_len))),
          end(static_cast<int>(far_end(ranges, span))),
          log2_pool(log2_pool_blocks) {}

    // Pools with a block below `end`.
    __device__ int pools() const { return (end + (1 << log2_pool) - 1) >> log2_pool; }
    __device__ int first_block(int pool) const { return pool << log2_pool; }
    __device__ int end_block(int pool) const { return min((pool + 1) << log2_pool, end); }
    __device__ bool is_cut(int pool) const { return end < min((pool + 1) << log2_pool, blocks); }
    // Keys of blocks [first, last).
    __device__ int keys(int first, int last) const {
        return static_cast<int>(min_i64(int64_t{last} * kBlockKeys, kv_len) -
                                int64_t{first} * kBlockKeys);
    }
    __device__ int keys(int block) const { return keys(block, block + 1); }
    __device__ int pool_keys(int pool) const { return keys(first_block(pool), end_block(pool)); }
    // Keys below `end`, walked or not.
    __device__ int64_t all_keys() const {
        return end > 0 ? min_i64(int64_t{end} * kBlockKeys, kv_len) : 0;
    }

    // The first pool after `previous` whose row is not its premade mean, pools() when there is
    // none. The walk stands on its first block behind `previous`.
    __device__ int next_changed(int previous, int walked_block) const {
        if (walked_block < end) return walked_block >> log2_pool;
        int last = pools() - 1;
        return last > previous && is_cut(last) ? last : pools();
    }
};

__device__ __forceinline__ int far_log2_pool(int64_t kv_len) {
    return 63 - __clzll(far_pool_blocks(kv_len));
}

// log2 of a pooled row's weight in units of raw scores, -inf for a row that is not there.
__device__ __forceinline__ float far_bias(int keys, float scale_log2) {
    return keys > 0 ? log2f(static_cast<float>(keys)) / scale_log2 : -INFINITY;
}
__device__ __forceinline__ float add_far_bias(float score, float bias) {
    return bias == -INFINITY ? bias : score + bias;  // also where the score is NaN
}

// Where a head's pools begin in FarPoolsParams' sums and means: `which` is 0 for keys, 1 for
// values.
__device__ __forceinline__ int64_t far_pools_offset(const Problem& p, int which, int64_t head) {
    return (which * p.batch * p.kv_heads + head) * num_far_pools(p.kv_len) * p.head_dim;
}

// Eight channels of a head's key or value means, 16 bytes a block.
template <class T>
struct WideChannels {
    static constexpr int kElems = 8;
    const T* means;     // of block 0
    const float* sums;  // of pool 0
    int64_t stride_block;
    int head_dim;

    __device__ WideChannels(const AttentionParams& params, const TileRows& tile, int which,
                            int chunk) {
        const Problem& p = params.problem;
        const BlockMeans& blocks = which == 0 ? params.far_field.key : params.far_field.value;
        const int64_t head = tile.batch * p.kv_heads + tile.kv_head;
        means = static_cast<const T*>(blocks.data) + head * blocks.stride_head + chunk * kElems;
        stride_block = blocks.stride_block;
        sums = params.far_field.sums + far_pools_offset(p, which, head) + chunk * kElems;
        head_dim = static_cast<int>(p.head_dim);
    }

    // sum += keys * the block's mean.
    __device__ __forceinline__ void add(float (&sum)[kElems], int block, int keys) const {
        uint4 mean = __ldg(reinterpret_cast<const uint4*>(means + block * stride_block));
        const uint32_t pairs[4] = {mean.x, mean.y, mean.z, mean.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 pair = unpack2<T>(pairs[i]);
            sum[2 * i] = fmaf(static_cast<float>(keys), pair.x, sum[2 * i]);
            sum[2 * i + 1] = fmaf(static_cast<float>(keys), pair.y, sum[2 * i + 1]);
        }
    }
    __device__ __forceinline__ void load_sum(float (&sum)[kElems], int pool) const {
        const float4* src = reinterpret_cast<const float4*>(sums + int64_t{pool} * head_dim);
        float4 low = __ldg(src), high = __ldg(src + 1);
        sum[0] = low.x, sum[1] = low.y, sum[2] = low.z, sum[3] = low.w;
        sum[4] = high.x, sum[5] = high.y, sum[6] = high.z, sum[7] = high.w;
    }
    __device__ static uint4 round(const float (&mean)[kElems]) {
        return {pack2<T>(mean[0], mean[1]), pack2<T>(mean[2], mean[3]), pack2<T>(mean[4], mean[5]),
                pack2<T>(mean[6], mean[7])};
    }
};

// sum = the pool's blocks below far_end that are not walked, one by one. Returns their keys. The
// walk passes the pool.
template <class Channels>
__device__ __forceinline__ int add_condensed(float (&sum)[Channels::kElems],
                                             const Channels& channels, const FarTile& far, int pool,
                                             WalkCursor& walked) {
#pragma unroll
    for (int e = 0; e < Channels::kElems; ++e) sum[e] = 0.0f;
    int keys = 0;
    int block = far.first_block(pool);
    const int end = far.end_block(pool);
    while (block < end) {
        const int run_end = min(walked.block, end);
        keys += block < run_end ? far.keys(block, run_end) : 0;
#pragma unroll 4
        for (; block < run_end; ++block) channels.add(sum, block, far.keys(block));
        if (walked.block >= end) break;
        walked.next();
        ++block;
    }
    return keys;
}

// sum = the premade sum of a whole pool less the walked blocks. Returns the keys that are left. The
// walk passes the pool.
template <class Channels>
__device__ __forceinline__ int subtract_walked(float (&sum)[Channels::kElems],
                                               const Channels& channels, const FarTile& far,
                                               int pool, WalkCursor& walked) {
    channels.load_sum(sum, pool);
    int keys = far.pool_keys(pool);
    for (; walked.block < far.end_block(pool); walked.next()) {
        const int block_keys = far.keys(walked.block);
        channels.add(sum, walked.block, -block_keys);
        keys -= block_keys;
    }
    return keys;
}

// mean = the pool's mean over its condensed keys, zeros where there are none. Returns their number.
// The walk passes the pool; restart() makes a new one.
template <class Channels, class Restart>
__device__ __forceinline__ int condense_pool(float (&mean)[Channels::kElems],
                                             const Channels& channels, const FarTile& far, int pool,
                                             WalkCursor& walked, const Restart& restart) {
    int keys;
    if (far.is_cut(pool)) {
        keys = add_condensed(mean, channels, far, pool, walked);
    } else {
        keys = subtract_walked(mean, channels, far, pool, walked);
        bool finite = true;
#pragma unroll
        for (int e = 0; e < Channels::kElems; ++e) finite &= fabsf(mean[e]) < INFINITY;
        if (!finite && keys > 0) {
            float added[Channels::kElems];
            WalkCursor again(restart());
            again.skip_to(far.first_block(pool));
            add_condensed(added, channels, far, pool, again);
#pragma unroll
            for (int e = 0; e < Channels::kElems; ++e)
                mean[e] = fabsf(mean[e]) < INFINITY ? mean[e] : added[e];
        }
    }
    const float inverse = 1.0f / static_cast<float>(keys);
#pragma unroll
    for (int e = 0; e < Channels::kElems; ++e) mean[e] = keys > 0 ? mean[e] * inverse : 0.0f;
    return keys;
}

// Visits the pools whose rows are not premade, ascending, with their ordinal: of those that
// wanted(pool, ordinal) the row is made and given to body(pool, ordinal, keys, mean). Returns how
// many pools there are.
template <class Channels, class Restart, class Wanted, class Body>
__device__ __forceinline__ int for_changed_pools(const FarTile& far, const Channels& channels,
                                                 const Restart& restart, const Wanted& wanted,
                                                 const Body& body) {
    WalkCursor walked(restart());
    int ordinal = 0;
    for (int pool = far.next_changed(-1, walked.block); pool < far.pools(); ++ordinal) {
        if (wanted(pool, ordinal)) {
            float mean[Channels::kElems];
            int keys = condense_pool(mean, channels, far, pool, walked, restart);
            body(pool, ordinal, keys, mean);
        } else {
            walked.skip_to(far.end_block(pool));
        }
        pool = far.next_changed(pool, walked.block);
    }
    return ordinal;
}

}  // namespace condensate::device
