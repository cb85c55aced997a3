// One list of blocks per tile: score the pooled queries against the summary units, 64 at a time,
// keep only each block's sum, turn the sums into softmax masses, take the largest.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/query_rows.h"

namespace condensate::cpu {
namespace {

struct Scratch {
    Scratch(Arena& arena, const BlockSelectParams& params)
        : dim(summary_dim(params.selector, static_cast<int>(params.problem.head_dim))),
          pools(arena, dim),
          pool_end(arena.take<int32_t>(kMaxRows)),
          units(arena.take<float>(kTileKeys * dim)),
          scores(arena.take<float>(kTileKeys * kScoreStride)) {
        const int64_t blocks = num_blocks(params.problem.kv_len);
        // The last 64 units may reach past the last block.
        const int64_t padded = blocks + kTileKeys;
        block_max = arena.take<float>(padded * kMaxRows);
        block_mass = arena.take<float>(padded * kMaxRows);
        tile_mass = arena.take<float>(blocks);
        order = arena.take<int32_t>(blocks);
        left_out = arena.take<float>(kMaxRows);
    }

    int64_t dim;
    QueryRows pools;  // rows are pooled queries; their positions are the pools' last ones
    int32_t* pool_end;
    float* units;
    float* scores;
    float* block_max;   // [block][padded pools]
    float* block_mass;  // [block][padded pools]
    float* tile_mass;   // [block]
    int32_t* order;     // eligible blocks
    float* left_out;    // [pool] mass of the eligible blocks that are not taken
};

class TileSelection {
  public:
    TileSelection(const BlockSelectParams& params, const TileOps& ops, int64_t item,
                  Scratch& scratch)
        : params_(params), p_(params.problem), ops_(ops), s_(scratch) {
        const int group = p_.group();
        const int64_t positions = tile_positions(group), tiles = num_tiles(p_.query_len, group);
        list_ = item;
        kv_head_ = item / tiles % p_.kv_heads;
        batch_ = item / tiles / p_.kv_heads;
        begin_ = item % tiles * positions;
        end_ = min_i64(begin_ + positions, p_.query_len);
        span_ = tile_span(item % tiles, static_cast<int>(positions), p_.query_len, p_.kv_len);
        units_per_block_ = units_per_block(params.selector);
        const int64_t all = num_blocks(p_.kv_len);
        blocks_ = p_.causal ? min_i64(all, ceil_div(max_i64(span_.last + 1, 0), kBlockKeys)) : all;
    }

    void run() {
        pool_queries();
        score_blocks();
        reduce_tile();
        store_list(take_largest());
        if (params_.omitted_mass_estimate != nullptr) store_estimate();
    }

  private:
    int panels() const { return s_.pools.panel_count(); }
    int64_t padded_pools() const { return panels() * kPanelRows; }

    // Means of consecutive queries, rounded as they would be stored; for quest split by sign.
    void pool_queries() {
        const int group = p_.group(), size = query_pool(group);
        s_.pools.clear();
        for (int64_t h = kv_head_ * group; h < (kv_head_ + 1) * group; ++h)
            for (int64_t i = begin_; i < end_; i += size) pool_one(h, i, min_i64(i + size, end_));
        for (int row = s_.pools.count; row < padded_pools(); ++row) {
            std::fill(s_.pools.line, s_.pools.line + s_.dim, 0.0f);
            s_.pools.put_line(row, s_.dim);
        }
    }

    void pool_one(int64_t h, int64_t first, int64_t end) {
        const int64_t dim = p_.head_dim;
        float* sum = s_.pools.line;
        float* query = s_.scores;  // not in use yet
        std::fill(sum, sum + dim, 0.0f);
        for (int64_t i = first; i < end; ++i) {
            ops_.load_rows(p_.dtype, element(params_.query, p_.dtype, batch_, h, i), 0, 1,
                           static_cast<int>(dim), query, static_cast<int>(dim));
            for (int64_t d = 0; d < dim; ++d) sum[d] += query[d];
        }
        for (int64_t d = 0; d < dim; ++d)
            sum[d] = round_to(p_.dtype, sum[d] / static_cast<float>(end - first));
        if (params_.selector == Selector::kQuest)
            for (int64_t d = 0; d < dim; ++d) {
                float x = sum[d];
                sum[d] = x < 0 ? 0.0f : x;
                sum[dim + d] = x > 0 ? 0.0f : x;
            }
        const int row = s_.pools.count;
        s_.pools.add(p_, h, end - 1);
        s_.pools.put_line(row, s_.dim);
    }

    void score_blocks() {
        const int64_t units = blocks_ * units_per_block_;
        const int64_t all_units = summary_units(params_.selector, p_.kv_len);
        const int64_t head = batch_ * p_.kv_heads + kv_head_;
        const int dim = static_cast<int>(s_.dim);
        for (int64_t begin = 0; begin < units; begin += kTileKeys) {
            const int count = static_cast<int>(min_i64(kTileKeys, units - begin));
            const char* source = static_cast<const char*>(params_.summaries) +
                                 (head * all_units + begin) * s_.dim * dtype_bytes(p_.dtype);
            ops_.load_rows(p_.dtype, source, s_.dim, count, dim, s_.units, dim);
            std::fill(s_.units + count * dim, s_.units + kTileKeys * dim, 0.0f);
            ops_.score(s_.pools.panels, s_.units, dim, dim, panels(), p_.scale, s_.scores);
            for (int row = 0; row < padded_pools(); ++row)
                s_.pool_end[row] = visible_units_end(row, begin);
            const int64_t at = begin / units_per_block_ * padded_pools();
            ops_.block_sums(s_.scores, units_per_block_, s_.pool_end, panels(), s_.block_max + at,
                            s_.block_mass + at);
        }
        ops_.block_masses(s_.block_max, s_.block_mass, blocks_, panels());
    }

    // Units are visible up to the one whose last key is the pool's last position.
    int32_t visible_units_end(int pool, int64_t first_unit) const {
        if (pool >= s_.pools.count) return 0;
        const int64_t keys = unit_keys(params_.selector);
        const int64_t last = s_.pools.position[pool];
        const int64_t end = !p_.causal || last >= p_.kv_len - 1 ? ceil_div(p_.kv_len, keys)
                            : last < 0                          ? 0
                                                                : (last + 1) / keys;
        return static_cast<int32_t>(max_i64(0, min_i64(end - first_unit, kTileKeys)));
    }

    void reduce_tile() {
        for (int64_t block = 0; block < blocks_; ++block) {
            const float* mass = s_.block_mass + block * padded_pools();
            s_.tile_mass[block] = *std::max_element(mass, mass + s_.pools.count);
        }
    }

    // The eligible blocks of largest mass, ties to the lower index, ascending in s_.order.
    int64_t take_largest() {
        int64_t count = 0;
        for (int64_t block = 0; block < blocks_; ++block)
            if (is_eligible(p_.ranges(), span_, block))
                s_.order[count++] = static_cast<int32_t>(block);
        if (count <= params_.max_blocks) return count;
        const float* mass = s_.tile_mass;
        std::nth_element(s_.order, s_.order + params_.max_blocks, s_.order + count,
                         [mass](int32_t a, int32_t b) {
                             return mass[a] > mass[b] || (mass[a] == mass[b] && a < b);
                         });
        std::sort(s_.order, s_.order + params_.max_blocks);
        return params_.max_blocks;
    }

    void store_list(int64_t count) {
        taken_ = count;
        int32_t* indices = params_.block_indices + list_ * params_.max_blocks;
        std::copy(s_.order, s_.order + count, indices);
        std::fill(indices + count, indices + params_.max_blocks, -1);
        params_.block_counts[list_] = static_cast<int32_t>(count);
    }

    // What a pool leaves out is summed directly: one minus the rest would lose small masses.
    void store_estimate() {
        std::fill(s_.left_out, s_.left_out + kMaxRows, 0.0f);
        int64_t next = 0;
        for (int64_t block = 0; block < blocks_; ++block) {
            if (next < taken_ && s_.order[next] == block) {
                ++next;
                continue;
            }
            if (!is_eligible(p_.ranges(), span_, block)) continue;
            const float* mass = s_.block_mass + block * padded_pools();
            for (int pool = 0; pool < s_.pools.count; ++pool) s_.left_out[pool] += mass[pool];
        }
        const int group = p_.group(), size = query_pool(group);
        const int64_t pools = ceil_div(end_ - begin_, size);
        for (int64_t g = 0; g < group; ++g)
            for (int64_t i = begin_; i < end_; ++i) {
                int64_t row = (batch_ * p_.query_heads + kv_head_ * group + g) * p_.query_len + i;
                params_.omitted_mass_estimate[row] =
                    std::min(1.0f, s_.left_out[g * pools + (i - begin_) / size]);
            }
    }

    const BlockSelectParams& params_;
    const Problem& p_;
    const TileOps& ops_;
    Scratch& s_;
    int64_t list_, kv_head_, batch_, begin_, end_;
    int64_t blocks_;  // that hold a key some query of the tile may see
    int64_t taken_ = 0;
    int units_per_block_;
    TileSpan span_;
};

}  // namespace

Status select_blocks(const BlockSelectParams& params, const Executor& executor) {
    const Problem& p = params.problem;
    const TileOps& ops = tile_ops();
    return for_each_item(
        executor, p.batch * p.kv_heads * num_tiles(p.query_len, p.group()),
        [&](Arena& arena) { return Scratch(arena, params); },
        [&](int64_t item, Scratch& scratch) { TileSelection(params, ops, item, scratch).run(); });
}

}  // namespace condensate::cpu
