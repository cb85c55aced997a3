// Masses of blocks for the averaged queries of a tile or scan tile: what lists are chosen by. A
// block's sums are kept as maximum and sum of exponentials, so that nothing overflows before the
// norm is known.
#pragma once

#include "cpu/select_tile.h"

namespace condensate::cpu {

// Scores for a scan tile and its tiles. What was scored last, and its sums, lie in the scratch.
class SelectScores {
  public:
    SelectScores(const BlockSelectParams& params, const TileOps& ops, const SelectTile& scan_tile,
                 SelectScratch& scratch)
        : params_(params), p_(params.problem), ops_(ops), s_(scratch), scan_tile_(scan_tile) {}

    int scan_pool() const {
        return scan_pool_size(params_.selector, scan_tile_.group, scan_tile_.kv_len);
    }
    int tile_pool() const { return pool_size(scan_tile_.group); }
    bool wants_estimate() const { return params_.omitted_mass_estimate != nullptr; }
    // Blocks whose units were scored last.
    BlockList visited() const { return {s_.visited, visited_}; }

    // ---- Queries ----

    // Means of `size` consecutive queries, rounded as they would be stored; for quest split by
    // sign.
    void pool_queries(QueryRows& pools, const SelectTile& tile, int size) {
        pools.clear();
        for (int64_t h = tile.first_head(); h < tile.end_head(); ++h)
            for (int64_t i = tile.first_query; i < tile.end_query(); i += size)
                pool_one(pools, h, i, min_i64(i + size, tile.end_query()));
        for (int row = pools.count; row < pools.panel_count() * kPanelRows; ++row) {
            std::fill(pools.line, pools.line + s_.dim, 0.0f);
            pools.put_line(row, s_.dim);
        }
    }

    // ---- Sums over units ----

    // Adds to the rows' sum (kSum), keeps the sum of every block (kBlocks), or both.
    enum class Keep { kSum, kBlocks, kBoth };
    void score_blocks(ScoredRows& scored, UnitLevel level, BlockList list, Keep keep) {
        const int panels = scored.rows.panel_count();
        float* scores = s_.units.scores();
        const RowMask& mask = s_.units.mask();
        s_.units.sweep(params_, ops_, scan_tile_, level, scored.rows, list, [&](int64_t n) {
            const int64_t at = n * scored.padded();
            if (keep != Keep::kSum)
                ops_.block_sums(scores, level.per_block, mask.visible_end, panels,
                                s_.block_max + at, s_.block_sum + at);
            if (keep == Keep::kBlocks) return;
            ops_.mask(mask, panels, scores);
            ops_.softmax(panels, scores, scored.state);
        });
    }

    // The mass sum * exp(max) of a block for every row, to `mass`; returns the largest.
    float block_mass(const ScoredRows& scored, const float* max, const float* sum, float* mass) {
        return ops_.block_mass(max, sum, scored.norm_max, scored.norm_inverse,
                               scored.rows.panel_count(), mass);
    }
    // Of the n-th block that was scored.
    float block_mass(const ScoredRows& scored, int64_t n, float* mass) {
        const int64_t at = n * scored.padded();
        return block_mass(scored, s_.block_max + at, s_.block_sum + at, mass);
    }

    // The hottest units' masses of all blocks over the scan tile's averaged queries. For the
    // estimate the sum over these units is left in the state.
    void scan() {
        ScoredRows& pools = s_.pools;
        pool_queries(pools.rows, scan_tile_, scan_pool());
        visited_ = scan_tile_.blocks;
        for (int64_t block = 0; block < visited_; ++block)
            s_.visited[block] = static_cast<int32_t>(block);
        const ScoringLevels levels = scan_levels(params_.selector);
        const BlockList all{s_.visited, visited_};
        pools.start_sum();
        if (params_.selector == Selector::kBlock) {
            score_blocks(pools, levels.norm, all, Keep::kSum);
            pools.take_norm(1);
            pools.start_sum();
            score_blocks(pools, levels.mass, all, wants_estimate() ? Keep::kBoth : Keep::kBlocks);
        } else {
            score_blocks(pools, levels.mass, all, Keep::kBoth);
            pools.take_norm(1);
        }
        for (int64_t block = 0; block < visited_; ++block)
            s_.tile_mass[block] =
                block_mass(pools, s_.block_max + block * pools.padded(), s_.ones, s_.mass);
    }

    // The masses of the short units, or of the candidates' keys, relative to the short units of the
    // `visited` blocks in s_.visited, by the tile's own averaged queries.
    void refine(const SelectTile& tile, int64_t visited, BlockList candidates) {
        ScoredRows& queries = s_.queries;
        visited_ = visited;
        pool_queries(queries.rows, tile, tile_pool());
        queries.start_sum();
        score_blocks(queries, kShortUnits, {s_.visited, visited_}, Keep::kBoth);
        if (params_.refinement() == Refinement::kKeys) {
            queries.take_norm(kShortUnits.keys);
            weigh_keys(candidates);
        } else {
            queries.take_norm(1);
            for (int64_t n = 0; n < visited_; ++n)
                s_.tile_mass[s_.visited[n]] = block_mass(queries, n, s_.mass);
        }
    }

    // Leaves each row's sum over the keys of a block in s_.key_max and s_.key_sum.
    void score_keys(int32_t block) {
        const QueryRows& rows = s_.queries.rows;
        s_.units.score_keys(params_, ops_, scan_tile_, rows, block);
        ops_.block_sums(s_.units.scores(), kBlockKeys, s_.units.mask().visible_end,
                        rows.panel_count(), s_.key_max, s_.key_sum);
    }

  private:
    void pool_one(QueryRows& pools, int64_t h, int64_t first, int64_t end) {
        const int64_t dim = p_.head_dim;
        float* sum = pools.line;
        float* query = s_.units.scores();  // not in use yet
        std::fill(sum, sum + dim, 0.0f);
        for (int64_t i = first; i < end; ++i) {
            ops_.load_rows(p_.dtype, element(params_.query, p_.dtype, scan_tile_.batch, h, i), 0, 1,
                           static_cast<int>(dim), query, static_cast<int>(dim));
            for (int64_t d = 0; d < dim; ++d) sum[d] += query[d];
        }
        for (int64_t d = 0; d < dim; ++d)
            sum[d] = round_to(p_.dtype, sum[d] / static_cast<float>(end - first));
        if (selector_traits(params_.selector).content == UnitContent::kBounds)
            for (int64_t d = 0; d < dim; ++d) {
                float x = sum[d];
                sum[d] = x < 0 ? 0.0f : x;
                sum[dim + d] = x > 0 ? 0.0f : x;
            }
        const int row = pools.count;
        pools.add(scan_tile_, h, end - 1);
        pools.put_line(row, s_.dim);
    }

    void weigh_keys(BlockList candidates) {
        for (int64_t n = 0; n < candidates.count; ++n) {
            const int32_t block = candidates.blocks[n];
            score_keys(block);
            s_.tile_mass[block] = block_mass(s_.queries, s_.key_max, s_.key_sum, s_.mass);
        }
    }

    const BlockSelectParams& params_;
    const Problem& p_;
    const TileOps& ops_;
    SelectScratch& s_;
    const SelectTile& scan_tile_;
    int64_t visited_ = 0;
};

}  // namespace condensate::cpu
