// What a selection leaves out, summed directly: one minus the rest would lose small shares.
#pragma once

#include "cpu/select_scores.h"

namespace condensate::cpu {

// Estimates of a scan tile's tiles, from what SelectScores scored last. A list is the one that the
// attention will walk beside anchors and windows.
class SelectEstimate {
  public:
    SelectEstimate(const BlockSelectParams& params, const TileOps& ops, const SelectTile& scan_tile,
                   SelectScores& scores, SelectScratch& scratch)
        : params_(params),
          p_(params.problem),
          ops_(ops),
          scan_tile_(scan_tile),
          scores_(scores),
          s_(scratch) {}

    // What the scan's averaged queries saw outside the scan tile's walk; NaN after a NaN or +inf.
    void sum_rest(int64_t shortlisted) {
        sum_unwalked(s_.pools, scan_tile_, {s_.shortlist, shortlisted});
        for (int pool = 0; pool < s_.pools.rows.count; ++pool) {
            const bool is_number = !std::isnan(s_.pools.state->sum[pool]);
            s_.rest[pool] = is_number ? std::log(s_.sums[pool]) + double{s_.base[pool]} : NAN;
        }
    }

    // The share of blocks that the attention does not walk in all that was seen of the keys: by the
    // units scored last, and beyond them by the scan.
    void by_units(const ScoredRows& scored, const SelectTile& tile, BlockList list) {
        sum_unwalked(scored, tile, list);
        store(tile, [&](int64_t g, int64_t i) {
            const int64_t row = pool_of(tile, scores_.tile_pool(), g, i);
            const double max = double{scored.state->max[row]};
            const double rest = s_.rest[pool_of(scan_tile_, scores_.scan_pool(), g, i)];
            const double base = std::max(max, rest);
            const double seen = std::exp(max - base), unseen = std::exp(rest - base);
            const double total = double{scored.state->sum[row]} * seen + unseen;
            // 0 where nothing is visible, and where NaN or +inf is.
            return total > 0 ? (s_.sums[row] * seen + unseen) / total : 0.0;
        });
    }

    // By keys within the walk. What the scan's units fall short of their keys is taken from the
    // shortlisted blocks that are not listed.
    void by_keys(const SelectTile& tile, BlockList list) {
        const RangeBlocks beside(tile.ranges(p_), tile.span());
        const int rows = s_.queries.rows.count;
        const double unit_keys = std::log(double{kShortUnits.keys});
        double seen[kMaxRows], left[kMaxRows], gap[kMaxRows] = {};  // logs
        std::fill(seen, seen + kMaxRows, -INFINITY);
        std::fill(left, left + kMaxRows, -INFINITY);
        int left_blocks = 0;
        for (int64_t n = 0; n < scores_.visited().count; ++n) {
            const bool is_left = !is_walked(beside, list, s_.visited[n]);
            const int64_t at = n * s_.queries.padded();
            scores_.score_keys(s_.visited[n]);
            left_blocks += is_left;
            for (int row = 0; row < rows; ++row) {
                const double keys = log_sum(s_.key_max[row], s_.key_sum[row]);
                seen[row] = log_add(seen[row], keys);
                if (!is_left) continue;
                left[row] = log_add(left[row], keys);
                gap[row] +=
                    keys - unit_keys - log_sum(s_.block_max[at + row], s_.block_sum[at + row]);
            }
        }
        store(tile, [&](int64_t g, int64_t i) {
            const int64_t row = pool_of(tile, scores_.tile_pool(), g, i);
            const double mean_gap = gap[row] / std::max(left_blocks, 1);
            const double beyond = s_.rest[pool_of(scan_tile_, scores_.scan_pool(), g, i)] +
                                  unit_keys + (std::isfinite(mean_gap) ? mean_gap : 0.0);
            // 0 where NaN or +inf is, which the units' sum tells.
            if (std::isnan(s_.queries.state->sum[row])) return 0.0;
            const double share = std::exp(log_add(left[row], beyond) - log_add(seen[row], beyond));
            return share > 0 ? share : 0.0;
        });
    }
    // `share(g, i)` is what query i of the group's head g leaves out.
    template <class Share>
    void store(const SelectTile& tile, const Share& share) {
        for (int64_t g = 0; g < tile.group; ++g)
            for (int64_t i = tile.first_query; i < tile.end_query(); ++i)
                params_.omitted_mass_estimate[tile.flat_query(p_, tile.first_head() + g, i)] =
                    static_cast<float>(std::min(1.0, share(g, i)));
    }

  private:
    // Does the attention walk the block when s_.order or s_.shortlist is what it lists?
    static bool is_walked(const RangeBlocks& beside, BlockList list, int32_t block) {
        return beside.contains(block) ||
               std::binary_search(list.blocks, list.blocks + list.count, block);
    }

    // Leaves in s_.sums each row's sum over the scored blocks that a walk leaves out, in units of
    // exp(s_.base).
    void sum_unwalked(const ScoredRows& scored, const SelectTile& tile, BlockList list) {
        for (int row = 0; row < kMaxRows; ++row)
            s_.base[row] = std::isfinite(scored.state->max[row]) ? scored.state->max[row] : 0.0f;
        std::fill(s_.sums, s_.sums + kMaxRows, 0.0);
        const RangeBlocks beside(tile.ranges(p_), tile.span());
        for (int64_t n = 0; n < scores_.visited().count; ++n) {
            if (is_walked(beside, list, s_.visited[n])) continue;
            const int64_t at = n * scored.padded();
            ops_.block_mass(s_.block_max + at, s_.block_sum + at, s_.base, s_.ones,
                            scored.rows.panel_count(), s_.mass);
            for (int row = 0; row < scored.rows.count; ++row) s_.sums[row] += double{s_.mass[row]};
        }
    }

    static double log_sum(float max, float sum) { return double{max} + std::log(double{sum}); }
    static double log_add(double a, double b) {
        const double most = std::max(a, b);
        if (std::isnan(a) || std::isnan(b)) return NAN;
        return std::isfinite(most) ? most + std::log(std::exp(a - most) + std::exp(b - most))
                                   : most;
    }

    // Row of the pool that query i of the group's head g is in.
    static int64_t pool_of(const SelectTile& tile, int size, int64_t g, int64_t i) {
        return g * ceil_div(tile.queries(), size) + (i - tile.first_query) / size;
    }

    const BlockSelectParams& params_;
    const Problem& p_;
    const TileOps& ops_;
    const SelectTile& scan_tile_;
    SelectScores& scores_;
    SelectScratch& s_;
};

}  // namespace condensate::cpu
