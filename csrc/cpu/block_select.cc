// One list of blocks per tile. The pooled queries of its scan tile scan the summaries of all
// blocks; with a refinement what they find heaviest is scored again by the tile's own. A block's
// sums are kept as maximum and sum of exponentials, so that nothing overflows before the norm is
// known.
#include <algorithm>
#include <cmath>

#include "cpu/block_walk.h"
#include "cpu/kernels.h"
#include "cpu/unit_scores.h"

namespace condensate::cpu {
namespace {

// The rows that are scored, and what their masses are relative to.
struct ScoredRows {
    ScoredRows(Arena& arena, int64_t dim)
        : rows(arena, dim),
          state(arena.take<SoftmaxState>(1)),
          norm_max(arena.take<float>(kMaxRows)),
          norm_inverse(arena.take<float>(kMaxRows)) {}

    QueryRows rows;
    SoftmaxState* state;  // of the units summed last
    float* norm_max;
    float* norm_inverse;  // 0 for a row that has no masses

    int64_t padded() const { return rows.panel_count() * kPanelRows; }

    void start_sum() {
        std::fill(state->max, state->max + kMaxRows, -INFINITY);
        std::fill(state->sum, state->sum + kMaxRows, 0.0f);
        std::fill(state->sum_error, state->sum_error + kMaxRows, 0.0f);
    }
    // Masses are relative to `times` the sum.
    void take_norm(int times) {
        for (int row = 0; row < kMaxRows; ++row) {
            const float sum = state->sum[row];
            const bool usable = sum > 0;  // it sees a unit, and no NaN or +inf, which make it NaN
            norm_max[row] = usable ? state->max[row] : 0.0f;
            norm_inverse[row] = usable ? 1.0f / (static_cast<float>(times) * sum) : 0.0f;
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
        key_max = arena.take<float>(kMaxRows);
        key_sum = arena.take<float>(kMaxRows);
        ones = arena.take<float>(kMaxRows);
        base = arena.take<float>(kMaxRows);
        rest = arena.take<double>(kMaxRows);
        sums = arena.take<double>(kMaxRows);
    }

    int64_t dim;
    ScoredRows pools;  // positions are the pools' last ones
    ScoredRows queries;
    UnitScores units;
    float* block_max;    // [n-th scored block][padded rows]
    float* block_sum;    // [n-th scored block][padded rows]
    float* tile_mass;    // [block]
    int32_t* visited;    // blocks whose units are scored
    int32_t* order;      // candidates for the list
    int32_t* shortlist;  // of the scan tile
    float* mass;         // [row]
    float* key_max;      // [row] of one block's keys
    float* key_sum;      // [row] of one block's keys
    float* ones;         // [row]
    float* base;         // [row] what exponentials are relative to
    double* rest;        // [pool] log of the sum over units that only the scan saw
    double* sums;        // [row]
};

// The queries begin..end-1 of a tile or scan tile.
struct QueryTile {
    QueryTile(const BlockSelectParams& params, int64_t index, int positions)
        : begin(index * positions),
          end(min_i64(begin + positions, params.problem.query_len)),
          span(tile_span(index, positions, params.problem.query_len, params.problem.kv_len)),
          blocks(reachable_blocks(params.problem.ranges(), span)),
          whole(params.whole_blocks(positions)) {}

    int64_t begin, end;
    TileSpan span;
    int64_t blocks;     // that hold a key some of the queries may see
    WholeBlocks whole;  // that no list needs
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
          scan_tile_(params, scan_tile, scan_positions(params.selector, p_.group(), p_.kv_len)),
          tile_(scan_tile_) {}

    void run() {
        std::fill(s_.ones, s_.ones + kMaxRows, 1.0f);
        std::fill(s_.rest, s_.rest + kMaxRows, -INFINITY);
        const int positions = tile_positions(p_.group());
        for (int64_t begin = scan_tile_.begin; begin < scan_tile_.end; begin += positions) {
            tile_ = QueryTile(params_, begin / positions, positions);
            list_ = head_ * num_tiles(p_.query_len, p_.group()) + begin / positions;
            select();
        }
    }

  private:
    bool wants_estimate() const { return params_.omitted_mass_estimate != nullptr; }
    int64_t batch() const { return head_ / p_.kv_heads; }
    int64_t first_head() const { return head_ % p_.kv_heads * p_.group(); }
    int scan_pool() const { return scan_pool_size(params_.selector, p_.group(), p_.kv_len); }
    int tile_pool() const { return pool_size(p_.group()); }
    int64_t budget() const { return params_.head_blocks(head_ % p_.kv_heads); }

    void select() {
        const int64_t eligible = find_eligible(tile_);
        const bool all_fit = eligible <= budget();
        if (all_fit || (budget() == 0 && !wants_estimate())) {  // there is nothing to rank
            store_list(min_i64(eligible, budget()));
            if (wants_estimate()) store_estimate([](int64_t, int64_t) { return 0.0; });
            return;
        }
        const bool refines = params_.refinement() != Refinement::kNone;
        int64_t candidates = eligible;
        if (refines)
            candidates = refine();
        else
            scan();
        store_list(take_enough(take_largest(candidates, budget())));
        if (wants_estimate()) {
            if (params_.refinement() == Refinement::kKeys)
                estimate_by_keys();
            else
                estimate(refines ? s_.queries : s_.pools);
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

    // Adds to the rows' sum (kSum), keeps the sum of every block (kBlocks), or both.
    enum class Keep { kSum, kBlocks, kBoth };
    void score_blocks(ScoredRows& scored, UnitLevel level, BlockList list, Keep keep) {
        const int panels = scored.rows.panel_count();
        float* scores = s_.units.scores();
        const RowMask& mask = s_.units.mask();
        s_.units.sweep(params_, ops_, head_, level, scored.rows, list, [&](int64_t n) {
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

    // The hottest units' masses of all blocks over the scan tile's pooled queries. For the estimate
    // the sum over these units is left in the state.
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

    // ---- The list ----

    // The eligible blocks, ascending in s_.order.
    int64_t find_eligible(const QueryTile& tile) {
        int64_t count = 0;
        for (int64_t block = 0; block < tile.blocks; ++block)
            if (is_eligible(p_.ranges(), tile.span, block, tile.whole))
                s_.order[count++] = static_cast<int32_t>(block);
        return count;
    }

    // Heavier blocks come first, of equal ones the lower index.
    auto heavier() const {
        return [mass = s_.tile_mass](int32_t a, int32_t b) {
            return mass[a] > mass[b] || (mass[a] == mass[b] && a < b);
        };
    }

    // Keeps the candidates of largest mass in s_.order, ascending.
    int64_t take_largest(int64_t candidates, int64_t width) {
        if (candidates <= width) return candidates;
        std::nth_element(s_.order, s_.order + width, s_.order + candidates, heavier());
        std::sort(s_.order, s_.order + width);
        return width;
    }

    // Drops the lightest blocks of s_.order that top_p can do without.
    int64_t take_enough(int64_t count) {
        if (params_.top_p == 0) return count;
        std::sort(s_.order, s_.order + count, heavier());
        const double spare = 1.0 - double{params_.top_p};
        double dropped = 0;
        while (count > 0) {
            dropped += double{s_.tile_mass[s_.order[count - 1]]};
            if (dropped > spare) break;
            --count;
        }
        std::sort(s_.order, s_.order + count);
        return count;
    }

    // Leaves the scan tile's shortlist in s_.shortlist.
    void make_shortlist() {
        const int64_t eligible = find_eligible(scan_tile_);
        const int64_t width = shortlist_width(params_.refinement(), params_.max_blocks);
        const bool scans = eligible > width;
        if (scans) scan();
        shortlisted_ = take_largest(eligible, width);
        std::copy(s_.order, s_.order + shortlisted_, s_.shortlist);
        if (scans && wants_estimate()) sum_rest();
    }

    // Leaves what the tile may list of the shortlist in s_.order, and it with what the attention
    // walks beside it in s_.visited.
    int64_t take_shortlist() {
        int64_t count = 0;
        for (int64_t n = 0; n < shortlisted_; ++n)
            if (is_eligible(p_.ranges(), tile_.span, s_.shortlist[n], tile_.whole))
                s_.order[count++] = s_.shortlist[n];
        BlockWalk walk(anchor_blocks(p_.ranges(), tile_.span),
                       window_blocks(p_.ranges(), tile_.span));
        uint32_t errors = 0;  // none: the list is our own
        walk.set_list(s_.order, count, count, tile_.blocks, &errors);
        visited_ = 0;
        for (BlockWalk::Step step; walk.next(&step);)
            s_.visited[visited_++] = static_cast<int32_t>(step.block);
        return count;
    }

    // Another look at the shortlist, by the tile's own pooled queries: masses of short units, or of
    // keys, relative to the short units of the walk. Returns how many candidates are in s_.order.
    int64_t refine() {
        if (shortlisted_ < 0) make_shortlist();
        const int64_t candidates = take_shortlist();
        ScoredRows& queries = s_.queries;
        pool_queries(queries.rows, tile_, tile_pool());
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
        return candidates;
    }

    void weigh_keys(int64_t candidates) {
        for (int64_t n = 0; n < candidates; ++n) {
            score_keys(s_.order[n]);
            s_.tile_mass[s_.order[n]] = block_mass(s_.queries, s_.key_max, s_.key_sum, s_.mass);
        }
    }
    // Leaves each row's sum over the keys of a block in s_.key_max and s_.key_sum.
    void score_keys(int32_t block) {
        const QueryRows& rows = s_.queries.rows;
        s_.units.score_keys(params_, ops_, head_, rows, block);
        ops_.block_sums(s_.units.scores(), kBlockKeys, s_.units.mask().visible_end,
                        rows.panel_count(), s_.key_max, s_.key_sum);
    }

    void store_list(int64_t count) {
        taken_ = count;
        int32_t* indices = params_.block_indices + list_ * params_.max_blocks;
        std::copy(s_.order, s_.order + count, indices);
        std::fill(indices + count, indices + params_.max_blocks, -1);
        params_.block_counts[list_] = static_cast<int32_t>(count);
    }

    // ---- What is left out, summed directly: one minus the rest would lose small shares ----

    // Does the attention walk the block when s_.order or s_.shortlist is what it lists?
    static bool is_walked(const RangeBlocks& beside, const int32_t* list, int64_t count,
                          int64_t block) {
        return beside.contains(static_cast<int>(block)) ||
               std::binary_search(list, list + count, static_cast<int32_t>(block));
    }

    // Leaves in s_.sums each row's sum over the scored blocks that a walk leaves out, in units of
    // exp(s_.base).
    void sum_unwalked(const ScoredRows& scored, const QueryTile& tile, const int32_t* list,
                      int64_t count) {
        for (int row = 0; row < kMaxRows; ++row)
            s_.base[row] = std::isfinite(scored.state->max[row]) ? scored.state->max[row] : 0.0f;
        std::fill(s_.sums, s_.sums + kMaxRows, 0.0);
        const RangeBlocks beside(p_.ranges(), tile.span);
        for (int64_t n = 0; n < visited_; ++n) {
            if (is_walked(beside, list, count, s_.visited[n])) continue;
            const int64_t at = n * scored.padded();
            ops_.block_mass(s_.block_max + at, s_.block_sum + at, s_.base, s_.ones,
                            scored.rows.panel_count(), s_.mass);
            for (int row = 0; row < scored.rows.count; ++row) s_.sums[row] += double{s_.mass[row]};
        }
    }

    // What the scan's pooled queries saw outside the scan tile's walk; NaN after a NaN or +inf.
    void sum_rest() {
        sum_unwalked(s_.pools, scan_tile_, s_.shortlist, shortlisted_);
        for (int pool = 0; pool < s_.pools.rows.count; ++pool) {
            const bool is_number = !std::isnan(s_.pools.state->sum[pool]);
            s_.rest[pool] = is_number ? std::log(s_.sums[pool]) + double{s_.base[pool]} : NAN;
        }
    }

    // The share of blocks that the attention does not walk in all that was seen of the keys: by the
    // units scored last, and beyond them by the scan.
    void estimate(const ScoredRows& scored) {
        sum_unwalked(scored, tile_, s_.order, taken_);
        store_estimate([&](int64_t g, int64_t i) {
            const int64_t row = pool_of(tile_, tile_pool(), g, i);
            const double max = double{scored.state->max[row]};
            const double rest = s_.rest[pool_of(scan_tile_, scan_pool(), g, i)];
            const double base = std::max(max, rest);
            const double seen = std::exp(max - base), unseen = std::exp(rest - base);
            const double total = double{scored.state->sum[row]} * seen + unseen;
            // 0 where nothing is visible, and where NaN or +inf is.
            return total > 0 ? (s_.sums[row] * seen + unseen) / total : 0.0;
        });
    }

    // By keys within the walk. What the scan's units fall short of their keys is taken from the
    // shortlisted blocks that are not listed.
    void estimate_by_keys() {
        const RangeBlocks beside(p_.ranges(), tile_.span);
        const int rows = s_.queries.rows.count;
        const double unit_keys = std::log(double{kShortUnits.keys});
        double seen[kMaxRows], left[kMaxRows], gap[kMaxRows] = {};  // logs
        std::fill(seen, seen + kMaxRows, -INFINITY);
        std::fill(left, left + kMaxRows, -INFINITY);
        int left_blocks = 0;
        for (int64_t n = 0; n < visited_; ++n) {
            const bool is_left = !is_walked(beside, s_.order, taken_, s_.visited[n]);
            const int64_t at = n * s_.queries.padded();
            score_keys(s_.visited[n]);
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
        store_estimate([&](int64_t g, int64_t i) {
            const int64_t row = pool_of(tile_, tile_pool(), g, i);
            const double mean_gap = gap[row] / std::max(left_blocks, 1);
            const double beyond = s_.rest[pool_of(scan_tile_, scan_pool(), g, i)] + unit_keys +
                                  (std::isfinite(mean_gap) ? mean_gap : 0.0);
            // 0 where NaN or +inf is, which the units' sum tells.
            if (std::isnan(s_.queries.state->sum[row])) return 0.0;
            const double share = std::exp(log_add(left[row], beyond) - log_add(seen[row], beyond));
            return share > 0 ? share : 0.0;
        });
    }
    static double log_sum(float max, float sum) { return double{max} + std::log(double{sum}); }
    static double log_add(double a, double b) {
        const double most = std::max(a, b);
        if (std::isnan(a) || std::isnan(b)) return NAN;
        return std::isfinite(most) ? most + std::log(std::exp(a - most) + std::exp(b - most))
                                   : most;
    }

    // Row of the pool that query i of the group's head g is in.
    static int64_t pool_of(const QueryTile& tile, int size, int64_t g, int64_t i) {
        return g * ceil_div(tile.end - tile.begin, size) + (i - tile.begin) / size;
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
    int64_t visited_ = 0;       // blocks whose units were scored last
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
