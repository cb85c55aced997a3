// One list of blocks per tile. The averaged queries of its scan tile scan the summaries of all
// blocks; with a refinement what they find heaviest is scored again by the tile's own.
#include "condensate/block_walk.h"
#include "cpu/kernels.h"
#include "cpu/select_estimate.h"

namespace condensate::cpu {
namespace {

// The tiles of a scan tile, one after another.
class TileSelection {
  public:
    TileSelection(const BlockSelectParams& params, const TileOps& ops, int64_t head,
                  int64_t scan_tile, SelectScratch& scratch)
        : params_(params),
          p_(params.problem),
          s_(scratch),
          scan_tile_(params, head, scan_tile,
                     scan_positions(params.selector, p_.group(), p_.kv_len)),
          scores_(params, ops, scan_tile_, scratch),
          estimate_(params, ops, scan_tile_, scores_, scratch) {}

    void run() {
        std::fill(s_.ones, s_.ones + kMaxRows, 1.0f);
        std::fill(s_.rest, s_.rest + kMaxRows, -INFINITY);
        const int positions = tile_positions(scan_tile_.group);
        const int64_t head = scan_tile_.flat_kv_head(p_), end = scan_tile_.end_query();
        for (int64_t begin = scan_tile_.first_query; begin < end; begin += positions)
            select(SelectTile(params_, head, begin / positions, positions));
    }

  private:
    void select(const SelectTile& tile) {
        const int64_t budget = params_.head_blocks(tile.kv_head);
        const int64_t eligible = find_eligible(tile);
        const bool all_fit = eligible <= budget;
        if (all_fit || (budget == 0 && !scores_.wants_estimate())) {  // there is nothing to rank
            store_list(tile, min_i64(eligible, budget));
            if (scores_.wants_estimate())
                estimate_.store(tile, [](int64_t, int64_t) { return 0.0; });
            return;
        }
        const bool refines = params_.refinement() != Refinement::kNone;
        int64_t candidates = eligible;
        if (refines)
            candidates = refine(tile);
        else
            scores_.scan();
        const BlockList list{s_.order, take_enough(take_largest(candidates, budget))};
        store_list(tile, list.count);
        if (!scores_.wants_estimate()) return;
        if (params_.refinement() == Refinement::kKeys)
            estimate_.by_keys(tile, list);
        else
            estimate_.by_units(refines ? s_.queries : s_.pools, tile, list);
    }

    // The eligible blocks, ascending in s_.order.
    int64_t find_eligible(const SelectTile& tile) {
        const Ranges ranges = tile.ranges(p_);
        const TileSpan span = tile.span();
        int64_t count = 0;
        for (int64_t block = 0; block < tile.blocks; ++block)
            if (is_eligible(ranges, span, block, tile.whole))
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

    // Another look at the shortlist by the tile's own queries. Returns how many candidates are in
    // s_.order.
    int64_t refine(const SelectTile& tile) {
        if (shortlisted_ < 0) make_shortlist();
        const int64_t candidates = take_shortlist(tile);
        scores_.refine(tile, find_walked(tile, candidates), {s_.order, candidates});
        return candidates;
    }

    // Leaves the scan tile's shortlist in s_.shortlist.
    void make_shortlist() {
        const int64_t eligible = find_eligible(scan_tile_);
        const int64_t width = shortlist_width(params_.refinement(), params_.max_blocks);
        const bool scans = eligible > width;
        if (scans) scores_.scan();
        shortlisted_ = take_largest(eligible, width);
        std::copy(s_.order, s_.order + shortlisted_, s_.shortlist);
        if (scans && scores_.wants_estimate()) estimate_.sum_rest(shortlisted_);
    }

    // What the tile may list of the shortlist, in s_.order.
    int64_t take_shortlist(const SelectTile& tile) {
        int64_t count = 0;
        for (int64_t n = 0; n < shortlisted_; ++n)
            if (is_eligible(tile.ranges(p_), tile.span(), s_.shortlist[n], tile.whole))
                s_.order[count++] = s_.shortlist[n];
        return count;
    }

    // What the attention would walk if the candidates in s_.order were the list, in s_.visited.
    int64_t find_walked(const SelectTile& tile, int64_t candidates) {
        BlockWalk walk(tile.ranges(p_), tile.span(), {s_.order, candidates, candidates});
        int64_t count = 0;
        for (int block; (block = walk.next().block) != INT_MAX;) s_.visited[count++] = block;
        return count;
    }

    void store_list(const SelectTile& tile, int64_t count) {
        int32_t* indices = params_.block_indices + tile.index * params_.max_blocks;
        std::copy(s_.order, s_.order + count, indices);
        std::fill(indices + count, indices + params_.max_blocks, -1);
        params_.block_counts[tile.index] = static_cast<int32_t>(count);
    }

    const BlockSelectParams& params_;
    const Problem& p_;
    SelectScratch& s_;
    const SelectTile scan_tile_;
    SelectScores scores_;
    SelectEstimate estimate_;
    int64_t shortlisted_ = -1;  // blocks; -1: not yet
};

}  // namespace

Status select_blocks(const BlockSelectParams& params, const Executor& executor) {
    const Problem& p = params.problem;
    const TileOps& ops = tile_ops();
    const int64_t tiles = num_scan_tiles(params.selector, p.query_len, p.group(), p.kv_len);
    return for_each_item(
        executor, p.batch * p.kv_heads * tiles,
        [&](Arena& arena) { return SelectScratch(arena, params); },
        [&](int64_t item, SelectScratch& scratch) {
            TileSelection(params, ops, item / tiles, item % tiles, scratch).run();
        });
}

}  // namespace condensate::cpu
