// The far field's index arithmetic: which blocks a tile condenses, and into which pools.
// docs/definition.md, "Far field", states it in words.
//
// With the far field on, a tile works on whole blocks. Blocks that its walk visits (anchors,
// window, list) are attended: every visible key of them, also those outside a row's window. Every
// other block whose keys all rows of the tile see is condensed: consecutive blocks form pools, and
// a pool enters the softmax as one term, the mean key and the mean value over those of its keys
// that are condensed, with their number as its weight.
#pragma once

#include <cstdint>

#include "condensate/geometry.h"

namespace condensate {

constexpr int kFarPools = 128;  // pools of a KV head, at most: one more step of the attention

// Blocks of a pool: the smallest power of two that leaves at most kFarPools pools.
CONDENSATE_HOST_DEVICE int64_t far_pool_blocks(int64_t kv_len) {
    int64_t blocks = 1;
    while (ceil_div(num_blocks(kv_len), blocks) > kFarPools) blocks *= 2;
    return blocks;
}
CONDENSATE_HOST_DEVICE int64_t num_far_pools(int64_t kv_len) {
    return ceil_div(num_blocks(kv_len), far_pool_blocks(kv_len));
}

// Running sums over the keys of a pool: after every kFarSumBlocks blocks of it, the last one the
// whole pool's. A tile that cuts the pool starts from one of them.
constexpr int kFarSumBlocks = 8;
CONDENSATE_HOST_DEVICE int64_t far_pool_sums(int64_t kv_len) {
    return max_i64(far_pool_blocks(kv_len) / kFarSumBlocks, 1);
}
CONDENSATE_HOST_DEVICE int64_t num_far_sums(int64_t kv_len) {
    return num_far_pools(kv_len) * far_pool_sums(kv_len);
}

// Blocks [0, far_end) are seen in full by every row of the tile.
CONDENSATE_HOST_DEVICE int64_t far_end(const Ranges& r, TileSpan t) {
    if (!r.causal) return num_blocks(r.kv_len);
    if (t.first + 1 >= r.kv_len) return num_blocks(r.kv_len);
    return t.first < 0 ? 0 : (t.first + 1) / kBlockKeys;
}

// Keys of a block: fewer in the last one.
CONDENSATE_HOST_DEVICE int64_t block_keys(int64_t kv_len, int64_t block) {
    return max_i64(min_i64(kv_len - block * kBlockKeys, kBlockKeys), 0);
}

// What the keys of pools weigh is estimated by that of the pools and by how far, on average, the
// tile's sampled blocks outweigh their mean scores: their Jensen gap. Sampled is every
// gap_stride-th valid entry of a list of `count`, if all rows see 64 keys of it.
constexpr int kGapBlocks = 8;  // at most; more do not bring the estimate closer
CONDENSATE_HOST_DEVICE int64_t gap_stride(int64_t count) {
    return max_i64(ceil_div(count, kGapBlocks), 1);
}
// A block that weighs less, as a share of the row's largest term, is not counted: float32 would
// lose some of its keys.
constexpr float kGapLeastWeight = 0x1p-64f;

}  // namespace condensate
