// The far field's pooled rows: what a tile leaves of each pool. The pools that its walk visits no
// block of, and that far_end does not cut, are the premade means; the others are made here.
//
// Arithmetic is float32. What is left of a pool is its sum less the walked blocks. The pool that
// far_end cuts starts from its last running sum below it, for nothing of a later key may enter.
// Channels where the difference is not finite are added up block by block instead, so that no
// infinity of a walked one enters.
#pragma once

#include <cstdint>

#include "condensate/far_field.h"
#include "condensate/params.h"
#include "device/pack.h"
#include "device/softmax.h"
#include "device/tile_walk.h"

namespace condensate::device {

// The pools of all keys. Blocks fit int as in BlockWalk.
struct FarShape {
    int blocks;     // of all keys
    int missing;    // keys that the last one lacks
    int log2_pool;  // blocks of a pool

    static CONDENSATE_HOST_DEVICE FarShape of(int64_t kv_len) {
        const int64_t blocks = num_blocks(kv_len), pool = far_pool_blocks(kv_len);
        int log2_pool = 0;
        while (int64_t{1} << log2_pool < pool) ++log2_pool;
        return {static_cast<int>(blocks), static_cast<int>(blocks * kBlockKeys - kv_len),
                log2_pool};
    }
};

// The pools of one tile.
struct FarTile : FarShape {
    int end;  // blocks that every row sees: far_end()

    __device__ FarTile(const FarShape& shape, const Ranges& ranges, TileSpan span)
        : FarShape(shape), end(static_cast<int>(far_end(ranges, span))) {}

    // Pools of all keys, and those with a block below `end`.
    __device__ int all_pools() const { return (blocks + (1 << log2_pool) - 1) >> log2_pool; }
    __device__ int pools() const { return (end + (1 << log2_pool) - 1) >> log2_pool; }
    __device__ int first_block(int pool) const { return pool << log2_pool; }
    __device__ int end_block(int pool) const { return min((pool + 1) << log2_pool, end); }
    __device__ bool is_cut(int pool) const { return end < min((pool + 1) << log2_pool, blocks); }

    // Running sums of a pool, the one that a tile starts from, counted over all pools, and the end
    // of the blocks that this one holds: first_block(pool) when there is none.
    __device__ int pool_sums() const { return max((1 << log2_pool) / kFarSumBlocks, 1); }
    __device__ int summed_end(int pool) const {
        const int first = first_block(pool);
        return is_cut(pool) ? first + (end - first) / kFarSumBlocks * kFarSumBlocks
                            : end_block(pool);
    }
    __device__ int sum_row(int pool) const {
        const int groups = (end - first_block(pool)) / kFarSumBlocks;
        return pool * pool_sums() + (is_cut(pool) ? groups : pool_sums()) - 1;
    }

    // Keys of blocks [first, last), of which there is at least one.
    __device__ int64_t keys(int first, int last) const {
        return int64_t{last - first} * kBlockKeys - (last == blocks ? missing : 0);
    }
    __device__ int block_keys(int block) const {
        return kBlockKeys - (block == blocks - 1 ? missing : 0);
    }
    __device__ int pool_keys(int pool) const {
        return static_cast<int>(keys(first_block(pool), end_block(pool)));
    }

    // The first pool after `previous` whose row is not its premade mean, pools() when there is
    // none. The walk stands on its first block behind `previous`.
    __device__ int next_changed(int previous, int walked_block) const {
        if (walked_block < end) return walked_block >> log2_pool;
        int last = pools() - 1;
        return last > previous && is_cut(last) ? last : pools();
    }
};

// log2 of a pooled row's weight in units of raw scores, -inf for a row that is not there.
__device__ __forceinline__ float far_bias(int keys, float scale) {
    return keys > 0 ? __fdividef(__log2f(static_cast<float>(keys)), exponent_scale(scale))
                    : -INFINITY;
}
__device__ __forceinline__ float add_far_bias(float score, float bias) {
    return bias == -INFINITY ? bias : score + bias;  // also where the score is NaN
}

// Where a head's pools begin in FarPoolsParams' means, of which there is one a pool, or in its
// sums: `which` is 0 for keys, 1 for values.
__device__ __forceinline__ int64_t far_pools_offset(const Problem& p, const FarTile& far, int which,
                                                    int head, int rows_per_pool = 1) {
    return (which * p.batch * p.kv_heads + head) * far.all_pools() * rows_per_pool * p.head_dim;
}

// kElems consecutive channels of a head's key or value means, read as one.
template <class T, int kElems_>
struct WideChannels {
    static constexpr int kElems = kElems_;
    static constexpr int kPairs = kElems / 2;
    struct alignas(2 * kElems) Packed {
        uint32_t pair[kPairs];
    };
    struct alignas(kElems < 4 ? 8 : 16) Floats {
        float elem[kElems];
    };

    const T* means;     // of block 0
    const float* sums;  // running, of pool 0
    int stride_block;   // elements; a block's summaries are few
    int head_dim;

    __device__ WideChannels(const AttentionParams& params, const FarTile& far, int head, int which,
                            int part) {
        const Problem& p = params.problem;
        const BlockMeans& blocks = which == 0 ? params.far_field.key : params.far_field.value;
        means = static_cast<const T*>(blocks.data) + head * blocks.stride_head + part * kElems;
        stride_block = static_cast<int>(blocks.stride_block);
        sums = params.far_field.sums + far_pools_offset(p, far, which, head, far.pool_sums()) +
               part * kElems;
        head_dim = static_cast<int>(p.head_dim);
    }

    // sum += keys * the block's mean.
    __device__ __forceinline__ void add(float (&sum)[kElems], int block, int keys) const {
        const Packed mean = *reinterpret_cast<const Packed*>(means + int64_t{block} * stride_block);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            float2 pair = unpack2<T>(mean.pair[i]);
            sum[2 * i] = fmaf(static_cast<float>(keys), pair.x, sum[2 * i]);
            sum[2 * i + 1] = fmaf(static_cast<float>(keys), pair.y, sum[2 * i + 1]);
        }
    }
    __device__ __forceinline__ void load_sum(float (&sum)[kElems], int row) const {
        const Floats running = *reinterpret_cast<const Floats*>(sums + int64_t{row} * head_dim);
#pragma unroll
        for (int e = 0; e < kElems; ++e) sum[e] = running.elem[e];
    }
    __device__ static Packed round(const float (&mean)[kElems]) {
        Packed packed;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) packed.pair[i] = pack2<T>(mean[2 * i], mean[2 * i + 1]);
        return packed;
    }
};

template <int kElems>
__device__ __forceinline__ bool all_finite(const float (&x)[kElems]) {
    bool finite = true;
#pragma unroll
    for (int e = 0; e < kElems; ++e) finite &= fabsf(x[e]) < INFINITY;
    return finite;
}

// mean = the pool's mean over its condensed keys, zeros where there are none. Returns their number.
// The walk stands at the pool's first walked block or before it, and passes the pool. All lanes of
// a warp call it with the same pool.
template <class Channels, class Walk>
__device__ __forceinline__ int condense_pool(float (&mean)[Channels::kElems],
                                             const Channels& channels, const FarTile& far, int pool,
                                             Walk& walked) {
    const int first = far.first_block(pool), end = far.end_block(pool);
    int summed = far.summed_end(pool), keys;
#pragma unroll 1
    while (true) {
#pragma unroll
        for (int e = 0; e < Channels::kElems; ++e) mean[e] = 0.0f;
        if (summed > first) channels.load_sum(mean, far.sum_row(pool));
        keys = far.pool_keys(pool);
        walked.skip_to(first);
        // Walked blocks leave the running sum; others come in behind it.
#pragma unroll 1
        for (; walked.block < summed; walked.next()) {
            const int count = far.block_keys(walked.block);
            channels.add(mean, walked.block, -count);
            keys -= count;
        }
#pragma unroll 1
        for (int block = summed; block < end; ++block) {
            const int count = far.block_keys(block);
            if (block == walked.block) {
                keys -= count;
                walked.next();
            } else {
                channels.add(mean, block, count);
            }
        }
        const bool complete = summed == first || keys == 0;
        if (complete || !__any_sync(0xffffffffu, !all_finite(mean))) break;
        summed = first;  // nothing can be taken out of a sum that is not finite
        walked.rewind();
    }
    const float inverse = __fdividef(1.0f, static_cast<float>(keys));
#pragma unroll
    for (int e = 0; e < Channels::kElems; ++e) mean[e] = keys > 0 ? mean[e] * inverse : 0.0f;
    return keys;
}

// Visits the pools whose rows are not premade, ascending, with their ordinal: of those that
// wanted(pool, ordinal) the row is made and given to body(pool, ordinal, keys, mean). Returns how
// many pools there are. All lanes of a warp call it, with the warp's walk at its beginning.
template <class Channels, class Walk, class Wanted, class Body>
__device__ __forceinline__ int for_changed_pools(const FarTile& far, const Channels& channels,
                                                 Walk walked, const Wanted& wanted,
                                                 const Body& body) {
    const bool recorded = walked.is_recorded();
    uint64_t starts = recorded ? walked.run_starts(far.log2_pool, far.end) : 0;
#pragma unroll 1
    for (int pool = -1, ordinal = 0;; ++ordinal) {
        if (!recorded) {
            walked.skip_to(pool < 0 ? 0 : far.end_block(pool));
        } else if (starts != 0) {
            walked.stand_at(__ffsll(static_cast<long long>(starts)) - 1);
            starts &= starts - 1;
        } else {
            walked.block = INT_MAX;
        }
        pool = far.next_changed(pool, walked.block);
        if (pool >= far.pools()) return ordinal;
        if (!wanted(pool, ordinal)) continue;
        float mean[Channels::kElems];
        int keys = condense_pool(mean, channels, far, pool, walked);
        body(pool, ordinal, keys, mean);
    }
}

}  // namespace condensate::device
