// Summaries of the keys: one pass, one block of 64 keys per work item.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/query_rows.h"

namespace condensate::cpu {
namespace {

struct Scratch {
    Scratch(Arena& arena, int64_t head_dim)
        : keys(arena.take<float>(kBlockKeys * head_dim)), unit(arena.take<float>(2 * head_dim)) {}
    float* keys;
    float* unit;
};

void mean_unit(const float* keys, int64_t count, int64_t dim, float* unit) {
    std::fill(unit, unit + dim, 0.0f);
    for (int64_t j = 0; j < count; ++j)
        for (int64_t d = 0; d < dim; ++d) unit[d] += keys[j * dim + d];
    for (int64_t d = 0; d < dim; ++d) unit[d] /= static_cast<float>(count);
}

// Maxima, then minima; a NaN stays, so that the unit's scores are not finite either.
void bounds_unit(const float* keys, int64_t count, int64_t dim, float* unit) {
    float* high = unit;
    float* low = unit + dim;
    std::copy(keys, keys + dim, high);
    std::copy(keys, keys + dim, low);
    for (int64_t j = 1; j < count; ++j)
        for (int64_t d = 0; d < dim; ++d) {
            float x = keys[j * dim + d];
            high[d] = x > high[d] || x != x ? x : high[d];
            low[d] = x < low[d] || x != x ? x : low[d];
        }
}

void summarise_block(const BlockSummaryParams& p, const TileOps& ops, int64_t item,
                     Scratch& scratch) {
    const int64_t blocks = num_blocks(p.kv_len), block = item % blocks;
    const int64_t head = item / blocks % p.kv_heads, batch = item / blocks / p.kv_heads;
    const int64_t begin = block * kBlockKeys, keys = min_i64(kBlockKeys, p.kv_len - begin);
    const int dim = static_cast<int>(p.head_dim), out_dim = summary_dim(p.selector, dim);
    ops.load_rows(p.dtype, element(p.key, p.dtype, batch, head, begin), p.key.stride_seq,
                  static_cast<int>(keys), dim, scratch.keys, dim);

    const int unit_size = unit_keys(p.selector);
    int64_t out = item * units_per_block(p.selector) * out_dim;
    for (int64_t first = 0; first < kBlockKeys; first += unit_size) {
        const int64_t count = min_i64(unit_size, keys - first);
        if (count <= 0)
            std::fill(scratch.unit, scratch.unit + out_dim, 0.0f);
        else if (p.selector == Selector::kQuest)
            bounds_unit(scratch.keys + first * dim, count, dim, scratch.unit);
        else
            mean_unit(scratch.keys + first * dim, count, dim, scratch.unit);
        for (int d = 0; d < out_dim; ++d)
            store_number(p.dtype, p.summaries, out++, scratch.unit[d]);
    }
}

}  // namespace

Status block_summaries(const BlockSummaryParams& params, const Executor& executor) {
    const TileOps& ops = tile_ops();
    return for_each_item(
        executor, params.batch * params.kv_heads * num_blocks(params.kv_len),
        [&](Arena& arena) { return Scratch(arena, params.head_dim); },
        [&](int64_t item, Scratch& scratch) { summarise_block(params, ops, item, scratch); });
}

}  // namespace condensate::cpu
