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

// The units of one level of a block of `keys` keys; `item` counts blocks over batch and heads.
template <class Summarise>
void store_units(const BlockSummaryParams& p, UnitLevel level, int64_t item, int64_t keys,
                 const Summarise& summarise, Scratch& scratch) {
    const int64_t dim = p.head_dim, out_dim = summary_dim(p.selector, static_cast<int>(dim));
    int64_t out = (item * rows_per_block(p.selector) + level.first_row) * out_dim;
    for (int64_t first = 0; first < kBlockKeys; first += level.keys) {
        const int64_t count = min_i64(level.keys, keys - first);
        if (count <= 0)
            std::fill(scratch.unit, scratch.unit + out_dim, 0.0f);
        else
            summarise(scratch.keys + first * dim, count, dim, scratch.unit);
        for (int64_t d = 0; d < out_dim; ++d)
            store_number(p.dtype, p.summaries, out++, scratch.unit[d]);
    }
}

void summarise_block(const BlockSummaryParams& p, const TileOps& ops, int64_t item,
                     Scratch& scratch) {
    const int64_t blocks = num_blocks(p.kv_len), block = item % blocks;
    const int64_t head = item / blocks % p.kv_heads, batch = item / blocks / p.kv_heads;
    const int64_t begin = block * kBlockKeys, keys = min_i64(kBlockKeys, p.kv_len - begin);
    const int dim = static_cast<int>(p.head_dim);
    ops.load_rows(p.dtype, element(p.key, p.dtype, batch, head, begin), p.key.stride_seq,
                  static_cast<int>(keys), dim, scratch.keys, dim);

    const ScoringLevels levels = scan_levels(p.selector);
    if (selector_traits(p.selector).content == UnitContent::kBounds) {
        store_units(p, levels.mass, item, keys, bounds_unit, scratch);
    } else {
        store_units(p, levels.mass, item, keys, mean_unit, scratch);
        if (has_two_levels(p.selector)) store_units(p, levels.norm, item, keys, mean_unit, scratch);
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
