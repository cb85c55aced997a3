// Scores of a tile's rows against the summary units of some blocks, 64 units at a time, or against
// the keys of one.
#pragma once

#include <algorithm>

#include "cpu/row_mask.h"

namespace condensate::cpu {

// Ascending blocks whose units are scored.
struct BlockList {
    const int32_t* blocks;
    int64_t count;
};

// A visible unit's last key is at or before the row's position: how many units of `keys` are.
inline int64_t visible_units(const Ranges& r, int64_t position, int keys) {
    if (!r.causal || position >= r.kv_len - 1) return ceil_div(r.kv_len, keys);
    return position < 0 ? 0 : (position + 1) / keys;
}

class UnitScores {
  public:
    UnitScores(Arena& arena, int64_t dim)
        : dim_(dim),
          units_(arena.take<float>(kTileKeys * dim)),
          scores_(arena.take<float>(kTileKeys * kScoreStride)),
          row_units_(arena.take<int64_t>(kMaxRows)),
          mask_(arena.take<RowMask>(1)) {}

    float* scores() { return scores_; }
    // Its visible_end says how many units or keys of the tile each row sees; they come first.
    const RowMask& mask() const { return *mask_; }

    // Calls visit(n) with every tile of units, n being the first of its blocks in `list`.
    template <class Visit>
    void sweep(const BlockSelectParams& params, const TileOps& ops, const Tile& tile,
               UnitLevel level, const QueryRows& rows, BlockList list, const Visit& visit) {
        start(tile.ranges(params.problem), rows, level);
        const int64_t head = tile.flat_kv_head(params.problem);
        const int dim = static_cast<int>(dim_);
        for (int64_t n = 0; n < list.count; n += kTileKeys / level.per_block) {
            const int64_t count = min_i64(kTileKeys / level.per_block, list.count - n);
            load(params, ops, head, level, list.blocks + n, count);
            ops.score(rows.panels, units_, dim, dim, rows.panel_count(), params.problem.scale,
                      scores_);
            set_visible(level, rows, list.blocks + n, count);
            visit(n);
        }
    }

    // The keys of one block, as one tile.
    void score_keys(const BlockSelectParams& params, const TileOps& ops, const Tile& tile,
                    const QueryRows& rows, int64_t block) {
        const Problem& p = params.problem;
        const int dim = static_cast<int>(dim_);
        load_tile(ops, p, view_of(params.key, p, tile.batch, tile.kv_head), tile.kv_len,
                  block * kBlockKeys, dim, units_);
        ops.score(rows.panels, units_, dim, dim, rows.panel_count(), p.scale, scores_);
        fill_mask(tile.ranges(p), rows, block, /*listed=*/true, nullptr, nullptr, mask_);
    }

  private:
    void start(const Ranges& ranges, const QueryRows& rows, UnitLevel level) {
        for (int row = 0; row < kMaxRows; ++row) {
            row_units_[row] =
                row < rows.count ? visible_units(ranges, rows.position[row], level.keys) : 0;
            mask_->free_end[row] = kTileKeys;  // visibility alone decides
            mask_->window_begin[row] = mask_->window_end[row] = mask_->tie_end[row] = 0;
            mask_->threshold[row] = __builtin_inff();
        }
    }

    void load(const BlockSelectParams& params, const TileOps& ops, int64_t head, UnitLevel level,
              const int32_t* blocks, int64_t count) {
        const DType dtype = params.problem.dtype;
        const int per_row = rows_per_block(params.selector), dim = static_cast<int>(dim_);
        const int64_t first = head * summary_rows(params.selector, params.problem.kv_len);
        float* target = units_;
        for (int64_t n = 0; n < count; ++n, target += level.per_block * dim) {
            const int64_t row = first + summary_row(level, per_row, blocks[n] * level.per_block);
            ops.load_rows(
                dtype, static_cast<const char*>(params.summaries) + row * dim * dtype_bytes(dtype),
                dim, level.per_block, dim, target, dim);
        }
        std::fill(target, units_ + kTileKeys * dim, 0.0f);
    }

    // Blocks and units ascend, so what a row sees of them is a prefix.
    void set_visible(UnitLevel level, const QueryRows& rows, const int32_t* blocks, int64_t count) {
        const int64_t end = (int64_t{blocks[count - 1]} + 1) * level.per_block;
        for (int row = 0; row < rows.panel_count() * kPanelRows; ++row) {
            const int64_t units = row_units_[row];
            int64_t visible = 0;
            if (units >= end)
                visible = count * level.per_block;
            else
                for (int64_t n = 0; n < count && blocks[n] * level.per_block < units; ++n)
                    visible += min_i64(units - blocks[n] * level.per_block, level.per_block);
            mask_->visible_end[row] = static_cast<int32_t>(visible);
        }
    }

    int64_t dim_;
    float* units_;
    float* scores_;
    int64_t* row_units_;
    RowMask* mask_;
};

}  // namespace condensate::cpu
