// One list of blocks per tile. The pooled queries of its scan tile scan the summaries of all
// blocks; for `block` what they find heaviest is scored again by pairs of the tile's own. A block's
// sums are kept as maximum and sum of exponentials, so that nothing overflows before the norm is
// known.
#include <algorithm>
#include <cmath>

#include "cpu/block_walk.h"
#include "cpu/kernels.h"
#include "cpu/unit_scores.h"

namespace condensate::cpu {
namespace {

// The rows that are scored, and the sum over the norm level of each.
struct ScoredRows {
    ScoredRows(Arena& arena, int64_t dim)
        : rows(arena, dim),
          state(arena.take<SoftmaxState>(1)),
          norm_max(arena.take<float>(kMaxRows)),
          norm_inverse(arena.take<float>(kMaxRows)) {}

    QueryRows rows;
    SoftmaxState* state;
    float* norm_max;
    float* norm_inverse;  // 0 for a row that has no masses

    int64_t padded() const { return rows.panel_count() * kPanelRows; }

    void start_norm() {
        std::fill(state->max, state->max + kMaxRows, -INFINITY);
        std::fill(state->sum, state->sum + kMaxRows, 0.0f);
        std::fill(state->sum_error, state->sum_error + kMaxRows, 0.0f);
    }
    void finish_norm() {
        for (int row = 0; row < kMaxRows; ++row) {
            const float sum = state->sum[row];
            const bool usable = sum > 0;  // it sees a unit, and no NaN or +inf, which make it NaN
            norm_max[row] = usable ? state->max[row] : 0.0f;
            norm_inverse[row] = usable ? 1.0f / sum : 0.0f;
        }
    }
};

struct Scratch {
    Scratch(Arena& arena, const BlockSelectParams& params)
        : dim(summary_dim(params.selector, static_cast<int>(params.problem.head_dim))),
          pools(arena, dim),
          queries(arena, dim),
          units(arena, dim) {
        const int64_t blocks = num_blocks(params.problem.kv_len);
        // The last 64 units may reach past the last block.
        const int64_t padded = blocks + kTileKeys;
        block_max = arena.take<float>(padded * kMaxRows);
        block_sum = arena.take<float>(padded * kMaxRows);
        tile_mass = arena.take<float>(blocks);
        visited = arena.take<int32_t>(blocks);
        order = arena.take<int32_t>(blocks);
        shortlist = arena.take<int32_t>(blocks);
        mass = arena.take<float>(kMaxRows);
        ones = arena.take<float>(kMaxRows);
        rest = arena.take<float>(kMaxRows);
        omitted = arena.take<double>(kMaxRows);
        total = arena.take<double>(kMaxRows);
    }

    int64_t dim;
    ScoredRows pools;  // positions are the pools' last ones
    ScoredRows queries;
    UnitScores units;
    float* block_max;    // [n-th scored block][padded rows]
    float* block_sum;    // [n-th scored block][padded rows]
    float* tile_mass;    // [block]
    int32_t* visited;    // blocks that are scored
    int32_t* order;      // candidates for the list
    int32_t* shortlist;  // of the scan tile
    float* mass;         // [row]
    float* ones;         // [row]
    float* rest;         // [pool] log of the sum over the middle units that no query scored finely
    double* omitted;     // [row]
    double* total;       // [row]
};

// The queries begin..end-1 of a tile or scan tile.
struct QueryTile {
    QueryTile(const Problem& p, int64_t index, int positions)
        : begin(index * positions),
          end(min_i64(begin + positions, p.query_len)),
          span(tile_span(index, positions, p.query_len, p.kv_len)),
          blocks(reachable_blocks(p.ranges(), span)) {}

    int64_t begin, end;
    TileSpan span;
    int64_t blocks;  // that hold a key some of the queries may see
};

// The tiles of a scan tile, one after another.
class TileSelection {
  public:
    TileSelection(const BlockSelectParams& params, const TileOps& ops, int64_t head,
                  int64_t scan_tile, Scratch& scratch)
        : params_(params),
          p_(params.problem),
          ops_(ops),
          s_(scratch),
          head_(head),
          scan_tile_(p_, scan_tile, scan_positions(params.selector, p_.group(), p_.kv_len)),
          tile_(scan_tile_) {}

    void run() {
        const int positions = tile_positions(p_.group());
        for (int64_t begin = scan_tile_.begin; begin < scan_tile_.end; begin += positions) {
            tile_ = QueryTile(p_, begin / positions, positions);
            list_ = head_ * num_tiles(p_.query_len, p_.group()) + begin / positions;
            select();
        }
    }

  private:
    bool wants_estimate() const { return params_.omitted_mass_estimate != nullptr; }
    int64_t batch() const { return head_ / p_.kv_heads; }
    int64_t first_head() const { return head_ % p_.kv_heads * p_.group(); }
    int scan_pool() const { return scan_pool_size(params_.selector, p_.group(), p_.kv_len); }
    int refinement_pool() const { return pool_size(p_.group(), kRefinementPool); }

    void select() {
        const int64_t eligible = find_eligible(tile_), width = params_.max_blocks;
        const bool all_fit = eligible <= width;
        if (all_fit || (width == 0 && !wants_estimate())) {  // there is nothing to rank
            store_list(min_i64(eligible, width));
            if (wants_estimate()) store_estimate([](int64_t, int64_t) { return 0.0; });
        } else if (params_.selector == Selector::kBlock) {
            if (shortlisted_ < 0) make_shortlist();
            const int64_t shortlisted = take_shortlist();
            refine(shortlisted);
            store_list(take_largest(shortlisted, width));
            if (wants_estimate()) estimate_refined();
        } else {
            scan();
            store_list(take_largest(eligible, width));
            if (wants_estimate()) estimate_scanned();
        }
    }

    // ---- Queries ----

    // Means of `size` consecutive queries, rounded as they would be stored; for quest split by
    // sign.
    void pool_queries(QueryRows& pools, const QueryTile& tile, int size) {
        pools.clear();
        for (int64_t h = first_head(); h < first_head() + p_.group(); ++h)
            for (int64_t i = tile.begin; i < tile.end; i += size)
                pool_one(pools, h, i, min_i64(i + size, tile.end));
        for (int row = pools.count; row < pools.panel_count() * kPanelRows; ++row) {
            std::fill(pools.line, pools.line + s_.dim, 0.0f);
            pools.put_line(row, s_.dim);
        }
    }

    void pool_one(QueryRows& pools, int64_t h, int64_t first, int64_t end) {
        const int64_t dim = p_.head_dim;
        float* sum = pools.line;
        float* query = s_.units.scores();  // not in use yet
        std::fill(sum, sum + dim, 0.0f);
        for (int64_t i = first; i < end; ++i) {
            ops_.load_rows(p_.dtype, element(params_.query, p_.dtype, batch(), h, i), 0, 1,
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
        const int row = pools.count;
        pools.add(p_, h, end - 1);
        pools.put_line(row, s_.dim);
    }

    // ---- Sums over units ----

    // Adds to the rows' norm (kNorm), keeps the sum of every block (kBlocks), or both.
    enum class Keep { kNorm, kBlocks, kBoth };
    void score_blocks(ScoredRows& scored, UnitLevel level, BlockList list, Keep keep) {
        const int panels = scored.rows.panel_count();
        float* scores = s_.units.scores();
        const RowMask& mask = s_.units.mask();
        s_.units.sweep(params_, ops_, head_, level, scored.rows, list, [&](int64_t n) {
            const int64_t at = n * scored.padded();
            if (keep != Keep::kNorm)
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

    // The hottest units' masses of all blocks over the scan tile's pooled queries. For the estimate
    // the blocks' whole masses take the place of their sums.
    void scan() {
        const int64_t blocks = scan_tile_.blocks;
        pool_queries(s_.pools.rows, scan_tile_, scan_pool());
        for (int64_t block = 0; block < blocks; ++block)
            s_.visited[block] = static_cast<int32_t>(block);
        const ScoringLevels levels = scan_levels(params_.selector);
        const BlockList all{s_.visited, blocks};
        s_.pools.start_norm();
        if (params_.selector == Selector::kBlock) {
            score_blocks(s_.pools, levels.norm, all, Keep::kNorm);
            score_blocks(s_.pools, levels.mass, all, Keep::kBlocks);
        } else {
            score_blocks(s_.pools, levels.mass, all, Keep::kBoth);
        }
        s_.pools.finish_norm();
        std::fill(s_.ones, s_.ones + kMaxRows, 1.0f);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t at = block * s_.pools.padded();
            s_.tile_mass[block] = block_mass(s_.pools, s_.block_max + at, s_.ones, s_.mass);
            if (wants_estimate())
                block_mass(s_.pools, s_.block_max + at, s_.block_sum + at, s_.block_sum + at);
        }
    }

    // ---- The list ----

    // The eligible blocks, ascending in s_.order.
    int64_t find_eligible(const QueryTile& tile) {
        int64_t count = 0;
        for (int64_t block = 0; block < tile.blocks; ++block)
            if (is_eligible(p_.ranges(), tile.span, block))
                s_.order[count++] = static_cast<int32_t>(block);
        return count;
    }

    // Keeps the candidates of largest mass in s_.order, ties to the lower index, ascending.
    int64_t take_largest(int64_t candidates, int64_t width) {
        if (candidates <= width) return candidates;
        const float* mass = s_.tile_mass;
        std::nth_element(s_.order, s_.order + width, s_.order + candidates,
                         [mass](int32_t a, int32_t b) {
                             return mass[a] > mass[b] || (mass[a] == mass[b] && a < b);
                         });
        std::sort(s_.order, s_.order + width);
        return width;
    }

    // Leaves the scan tile's shortlist in s_.shortlist.
    void make_shortlist() {
        const int64_t eligible = find_eligible(scan_tile_);
        const int64_t width = shortlist_width(params_.max_blocks);
        const bool scans = eligible > width;
        if (scans) scan();
        shortlisted_ = take_largest(eligible, width);
        std::copy(s_.order, s_.order + shortlisted_, s_.shortlist);
        std::fill(s_.rest, s_.rest + kMaxRows, -INFINITY);
        if (scans && wants_estimate()) {
            walk(scan_tile_, shortlisted_);
            sum_rest();
        }
    }

    // Leaves what the tile may list of the shortlist in s_.order, and it with what the attention
    // walks beside it in s_.visited.
    int64_t take_shortlist() {
        int64_t count = 0;
        for (int64_t n = 0; n < shortlisted_; ++n)
            if (is_eligible(p_.ranges(), tile_.span, s_.shortlist[n]))
                s_.order[count++] = s_.shortlist[n];
        walk(tile_, count);
        return count;
    }

    // Of the blocks in s_.order.
    void walk(const QueryTile& tile, int64_t count) {
        BlockWalk walk(anchor_blocks(p_.ranges(), tile.span),
                       window_blocks(p_.ranges(), tile.span));
        uint32_t errors = 0;  // none: the list is our own
        walk.set_list(s_.order, count, count, tile.blocks, &errors);
        walked_ = 0;
        for (BlockWalk::Step step; walk.next(&step);)
            s_.visited[walked_++] = static_cast<int32_t>(step.block);
    }

    // The query pairs' masses of the shortlisted blocks, from their fine units.
    void refine(int64_t shortlisted) {
        ScoredRows& queries = s_.queries;
        const BlockList walked{s_.visited, walked_};
        pool_queries(queries.rows, tile_, refinement_pool());
        queries.start_norm();
        score_blocks(queries, kRefinementLevels.norm, walked, Keep::kNorm);
        queries.finish_norm();
        // Beside the shortlist only the estimate looks at fine units.
        const BlockList fine = wants_estimate() ? walked : BlockList{s_.order, shortlisted};
        score_blocks(queries, kRefinementLevels.mass, fine, Keep::kBlocks);
        for (int64_t n = 0; n < fine.count; ++n)
            s_.tile_mass[fine.blocks[n]] = block_mass(queries, n, s_.mass);
    }

    void store_list(int64_t count) {
        taken_ = count;
        int32_t* indices = params_.block_indices + list_ * params_.max_blocks;
        std::copy(s_.order, s_.order + count, indices);
        std::fill(indices + count, indices + params_.max_blocks, -1);
        params_.block_counts[list_] = static_cast<int32_t>(count);
    }

    // ---- What is left out, summed directly: one minus the rest would lose small shares ----

    bool is_left_out(int64_t block) const {
        return is_eligible(p_.ranges(), tile_.span, block) &&
               !std::binary_search(s_.order, s_.order + taken_, static_cast<int32_t>(block));
    }

    // Each pool's sum over the middle units outside the scan tile's walk, from the masses of the
    // scan.
    void sum_rest() {
        const ScoredRows& pools = s_.pools;
        std::fill(s_.total, s_.total + kMaxRows, 0.0);
        int64_t next = 0;
        for (int64_t block = 0; block < scan_tile_.blocks; ++block) {
            if (next < walked_ && s_.visited[next] == block) {
                ++next;
                continue;
            }
            const float* mass = s_.block_sum + block * pools.padded();
            for (int pool = 0; pool < pools.rows.count; ++pool)
                s_.total[pool] += double{mass[pool]};
        }
        for (int pool = 0; pool < pools.rows.count; ++pool)
            if (s_.total[pool] > 0)
                s_.rest[pool] =
                    static_cast<float>(std::log(s_.total[pool] / double{pools.norm_inverse[pool]}) +
                                       double{pools.norm_max[pool]});
    }

    void estimate_scanned() {
        const ScoredRows& pools = s_.pools;
        std::fill(s_.omitted, s_.omitted + kMaxRows, 0.0);
        for (int64_t block = 0; block < tile_.blocks; ++block) {
            if (!is_left_out(block)) continue;
            const float* mass = s_.block_sum + block * pools.padded();
            for (int pool = 0; pool < pools.rows.count; ++pool)
                s_.omitted[pool] += double{mass[pool]};
        }
        store_estimate([&](int64_t g, int64_t i) { return s_.omitted[scanned_pool(g, i)]; });
    }

    // Fine units inside the walk; outside of it four times the middle ones of the pool, which stand
    // for sixteen keys where fine ones stand for four.
    void estimate_refined() {
        const ScoredRows& queries = s_.queries;
        choose_bases();
        std::fill(s_.omitted, s_.omitted + kMaxRows, 0.0);
        std::fill(s_.total, s_.total + kMaxRows, 0.0);
        for (int64_t n = 0; n < walked_; ++n) {
            block_mass(queries, n, s_.mass);
            const bool left_out = is_left_out(s_.visited[n]);
            for (int row = 0; row < queries.rows.count; ++row) {
                s_.total[row] += double{s_.mass[row]};
                if (left_out) s_.omitted[row] += double{s_.mass[row]};
            }
        }
        store_estimate([&](int64_t g, int64_t i) {
            const int64_t row = pool_of(tile_, refinement_pool(), g, i);
            const double rest =
                4 * std::exp(double{s_.rest[scanned_pool(g, i)]} - double{queries.norm_max[row]});
            const double total = s_.total[row] + rest;
            return total > 0 ? (s_.omitted[row] + rest) / total : 0.0;
        });
    }

    // Replaces the norms by 1 in units of each row's largest exponential.
    void choose_bases() {
        ScoredRows& queries = s_.queries;
        std::fill(queries.norm_inverse, queries.norm_inverse + kMaxRows, 1.0f);
        const int64_t padded = queries.padded();
        const int64_t size = refinement_pool();
        const int64_t per_head = ceil_div(tile_.end - tile_.begin, size);
        for (int64_t row = 0; row < queries.rows.count; ++row) {
            const int64_t i = tile_.begin + row % per_head * size, g = row / per_head;
            float base = s_.rest[scanned_pool(g, i)];
            for (int64_t n = 0; n < walked_; ++n)
                if (s_.block_sum[n * padded + row] > 0)
                    base = std::max(base, s_.block_max[n * padded + row]);
            queries.norm_max[row] = std::isfinite(base) ? base : 0.0f;
        }
    }

    // Row of the pool that query i of the group's head g is in.
    static int64_t pool_of(const QueryTile& tile, int size, int64_t g, int64_t i) {
        return g * ceil_div(tile.end - tile.begin, size) + (i - tile.begin) / size;
    }
    int64_t scanned_pool(int64_t g, int64_t i) const {
        return pool_of(scan_tile_, scan_pool(), g, i);
    }

    // `share(g, i)` is what query i of the group's head g leaves out.
    template <class Share>
    void store_estimate(const Share& share) {
        for (int64_t g = 0; g < p_.group(); ++g)
            for (int64_t i = tile_.begin; i < tile_.end; ++i) {
                const int64_t head = batch() * p_.query_heads + first_head() + g;
                params_.omitted_mass_estimate[head * p_.query_len + i] =
                    static_cast<float>(std::min(1.0, share(g, i)));
            }
    }

    const BlockSelectParams& params_;
    const Problem& p_;
    const TileOps& ops_;
    Scratch& s_;
    int64_t head_;  // KV head, of all batches
    QueryTile scan_tile_, tile_;
    int64_t list_ = 0;
    int64_t shortlisted_ = -1;  // blocks; -1: not yet
    int64_t walked_ = 0;
    int64_t taken_ = 0;
};

}  // namespace

Status select_blocks(const BlockSelectParams& params, const Executor& executor) {
    const Problem& p = params.problem;
    const TileOps& ops = tile_ops();
    const int64_t tiles = num_scan_tiles(params.selector, p.query_len, p.group(), p.kv_len);
    return for_each_item(
        executor, p.batch * p.kv_heads * tiles,
        [&](Arena& arena) { return Scratch(arena, params); },
        [&](int64_t item, Scratch& scratch) {
            TileSelection(params, ops, item / tiles, item % tiles, scratch).run();
        });
}

}  // namespace condensate::cpu
