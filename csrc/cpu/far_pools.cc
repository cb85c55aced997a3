// Pools of the far field: one pool of one KV head, of keys or of values, per work item.
#include <algorithm>

#include "cpu/far_tile.h"
#include "cpu/kernels.h"

namespace condensate::cpu {
namespace {

struct Scratch {
    Scratch(Arena& arena, int64_t dim) : line(arena.take<float>(dim)) {}
    float* line;
};

void sum_pool(const FarPoolsParams& p, const TileOps& ops, int64_t item, Scratch& scratch) {
    const int64_t pools = num_far_pools(p.kv_len), heads = p.batch * p.kv_heads;
    const int64_t pool = item % pools, head = item / pools % heads;
    const BlockMeans& means = item / pools / heads == 0 ? p.key : p.value;
    const int64_t width = far_pool_blocks(p.kv_len), begin = pool * width;
    const int64_t end = min_i64(begin + width, num_blocks(p.kv_len));
    const int dim = static_cast<int>(p.head_dim);

    const int64_t running = far_pool_sums(p.kv_len);
    float* sums = p.sums + item * running * dim;
    std::fill(sums, sums + dim, 0.0f);
    for (int64_t n = 0, block = begin; n < running; ++n) {
        if (n > 0) {
            std::copy(sums, sums + dim, sums + dim);
            sums += dim;
        }
        const int64_t until = n + 1 < running ? min_i64(block + kFarSumBlocks, end) : end;
        for (; block < until; ++block)
            add_block(ops, means, p.dtype, p.kv_len, head, block, dim, 1.0f, scratch.line, sums);
    }
    const float keys = static_cast<float>(min_i64(end * kBlockKeys, p.kv_len) - begin * kBlockKeys);
    for (int d = 0; d < dim; ++d) store_number(p.dtype, p.means, item * dim + d, sums[d] / keys);
}

}  // namespace

Status far_pools(const FarPoolsParams& params, const Executor& executor) {
    const TileOps& ops = tile_ops();
    return for_each_item(
        executor, 2 * params.batch * params.kv_heads * num_far_pools(params.kv_len),
        [&](Arena& arena) { return Scratch(arena, params.head_dim); },
        [&](int64_t item, Scratch& scratch) { sum_pool(params, ops, item, scratch); });
}

}  // namespace condensate::cpu
