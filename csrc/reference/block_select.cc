#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "reference/reference.h"
#include "reference/select_masses.h"

namespace condensate::reference {
namespace {

// ---- Choosing ----

Blocks all_blocks(const Tile& t) {
    Blocks blocks;
    for (int64_t block = 0; block < num_blocks(t.ranges().kv_len); ++block) blocks.push_back(block);
    return blocks;
}

Blocks eligible_blocks(const Tile& t) {
    Blocks blocks;
    for (int64_t block : all_blocks(t))
        if (is_eligible(t.ranges(), t.span, block, t.whole)) blocks.push_back(block);
    return blocks;
}

bool contains(const Blocks& blocks, int64_t block) {
    return std::binary_search(blocks.begin(), blocks.end(), block);
}

Blocks common(const Blocks& a, const Blocks& b) {
    Blocks blocks;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(blocks));
    return blocks;
}

Blocks without(const Blocks& a, const Blocks& b) {
    Blocks blocks;
    std::set_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(blocks));
    return blocks;
}

// What the attention walks: `listed` and the blocks of anchors and windows.
Blocks walked_blocks(const Tile& t, const Blocks& listed) {
    const RangeBlocks ranges(t.ranges(), t.span);
    Blocks walked;
    for (int64_t block : all_blocks(t))
        if (contains(listed, block) || ranges.contains(static_cast<int>(block)))
            walked.push_back(block);
    return walked;
}

// The `width` blocks of largest mass, heaviest first, ties to the lower index.
template <class Acc>
WeighedBlocks<Acc> heaviest(WeighedBlocks<Acc> weighed, int64_t width) {
    std::stable_sort(weighed.begin(), weighed.end(),
                     [](const auto& x, const auto& y) { return x.mass > y.mass; });
    if (static_cast<int64_t>(weighed.size()) > width) weighed.resize(static_cast<size_t>(width));
    return weighed;
}

// Leaves out the last ones as long as their masses add up to at most 1 - top_p.
template <class Acc>
WeighedBlocks<Acc> enough(WeighedBlocks<Acc> weighed, float top_p) {
    if (top_p == 0) return weighed;
    Acc left_out = 0;
    while (!weighed.empty()) {
        left_out += weighed.back().mass;
        if (left_out > 1 - static_cast<Acc>(top_p)) break;
        weighed.pop_back();
    }
    return weighed;
}

template <class Acc>
Blocks ascending(const WeighedBlocks<Acc>& weighed) {
    Blocks blocks;
    for (const Weighed<Acc>& w : weighed) blocks.push_back(w.block);
    std::sort(blocks.begin(), blocks.end());
    return blocks;
}

// What the blocks' hottest units weigh for the averaged queries of a scan tile.
template <class Acc>
WeighedBlocks<Acc> scan(const Tile& s, const Blocks& blocks) {
    const ScoringLevels levels = scan_levels(s.params.selector);
    return weigh<Acc>(
        s, pooled_queries<Acc>(s, s.scan_pool()), levels.norm, all_blocks(s), blocks,
        [&](const Query& q, int64_t block) { return hottest<Acc>(s, q, levels.mass, block); });
}

// A scan tile's shortlist: all its eligible blocks when there are no more.
template <class Acc>
Blocks make_shortlist(const Tile& s) {
    const Blocks eligible = eligible_blocks(s);
    const int64_t width = shortlist_width(s.params.refinement(), s.params.max_blocks);
    if (static_cast<int64_t>(eligible.size()) <= width) return eligible;
    return ascending(heaviest(scan<Acc>(s, eligible), width));
}

// The shares of W, `walked`, that the tile's averaged queries find in the shortlisted blocks.
template <class Acc>
WeighedBlocks<Acc> refine(const Tile& t, const Blocks& shortlist, const Blocks& walked) {
    auto by_units = [&](const Query& q, int64_t block) {
        return log_sum_of<Acc>(t, q, kShortUnits, {block});
    };
    auto by_keys = [&](const Query& q, int64_t block) {  // a unit stands for eight keys
        return log_sum_of_keys<Acc>(t, q, block) - std::log(static_cast<Acc>(kShortUnits.keys));
    };
    const std::vector<Query> queries = pooled_queries<Acc>(t, t.tile_pool());
    return t.params.refinement() == Refinement::kKeys
               ? weigh<Acc>(t, queries, kShortUnits, walked, shortlist, by_keys)
               : weigh<Acc>(t, queries, kShortUnits, walked, shortlist, by_units);
}

// A list, and what is known of the other blocks.
struct Choice {
    Blocks listed;
    Blocks seen;    // scored by the tile's own averaged queries: all, W with a refinement
    Blocks unseen;  // outside the scan tile's W: scored by its averaged queries
};

// The choice among more eligible blocks than the list holds.
template <class Acc>
Choice choose(const Tile& t, const Blocks& eligible) {
    auto list_of = [&](const WeighedBlocks<Acc>& weighed) {
        return ascending(enough(heaviest(weighed, t.budget()), t.params.top_p));
    };
    if (t.params.refinement() == Refinement::kNone)
        return {list_of(scan<Acc>(t, eligible)), all_blocks(t), {}};
    const Tile s = t.scan_tile();
    const Blocks scanned = make_shortlist<Acc>(s);
    const Blocks shortlist = common(scanned, eligible);
    const Blocks walked = walked_blocks(t, shortlist);
    return {list_of(refine<Acc>(t, shortlist, walked)), walked,
            without(all_blocks(t), walked_blocks(s, scanned))};
}

// ---- What is left out ----

// The mean of the tile's pool of `size` queries that query i of head h belongs to.
template <class Acc>
Query pool_around(const Tile& t, int64_t h, int64_t i, int64_t size) {
    const int64_t first = t.begin + (i - t.begin) / size * size;
    return pool<Acc>(t, h, first, min_i64(first + size, t.end));
}

// By keys within W. What the scan's units, `rest`, fall short of their keys is taken from those
// blocks of W that are not walked.
template <class Acc>
Acc omitted_by_keys(const Tile& t, const Query& query, const Blocks& seen, const Blocks& unwalked,
                    Acc rest) {
    const Acc unit_keys = std::log(static_cast<Acc>(kShortUnits.keys));
    auto by_keys = [&](const Blocks& blocks) {
        std::vector<Acc> sums;
        for (int64_t block : blocks) sums.push_back(log_sum_of_keys<Acc>(t, query, block));
        return log_sum(sums);
    };
    Acc gap = 0;
    for (int64_t block : unwalked)
        gap += by_keys({block}) - unit_keys - log_sum_of<Acc>(t, query, kShortUnits, {block});
    gap /= static_cast<Acc>(std::max<size_t>(unwalked.size(), 1));
    const Acc beyond = rest + unit_keys + (std::isfinite(gap) ? gap : 0);
    return mass_of(log_sum<Acc>({by_keys(unwalked), beyond}),
                   log_sum<Acc>({by_keys(seen), beyond}));
}

// The share of query i of head h in blocks that the attention does not walk.
template <class Acc>
Acc omitted_share(const Tile& t, int64_t h, int64_t i, const Choice& choice) {
    const UnitLevel level = scan_levels(t.params.selector).mass;
    const Query query = pool_around<Acc>(t, h, i, t.tile_pool());
    const Query scanned = pool_around<Acc>(t.scan_tile(), h, i, t.scan_pool());
    const Blocks unwalked = without(choice.seen, walked_blocks(t, choice.listed));
    const Acc rest = log_sum_of<Acc>(t, scanned, level, choice.unseen);
    if (t.params.refinement() == Refinement::kKeys)
        return omitted_by_keys<Acc>(t, query, choice.seen, unwalked, rest);
    return mass_of(log_sum<Acc>({log_sum_of<Acc>(t, query, level, unwalked), rest}),
                   log_sum<Acc>({log_sum_of<Acc>(t, query, level, choice.seen), rest}));
}

// share(h, i) is what query i of head h leaves out.
template <class Share>
void store_estimate(const Tile& t, const Share& share) {
    const Problem& p = t.params.problem;
    if (t.params.omitted_mass_estimate == nullptr) return;
    for (int64_t h = t.first_head(); h < t.end_head(); ++h)
        for (int64_t i = t.begin; i < t.end; ++i)
            t.params.omitted_mass_estimate[(t.b * p.query_heads + h) * p.query_len + i] =
                static_cast<float>(share(h, i));
}

void store_list(const Tile& t, const Blocks& taken) {
    t.params.block_counts[t.list()] = static_cast<int32_t>(taken.size());
    int32_t* indices = t.params.block_indices + t.list() * t.params.max_blocks;
    for (size_t n = 0; n < static_cast<size_t>(t.params.max_blocks); ++n)
        indices[n] = n < taken.size() ? static_cast<int32_t>(taken[n]) : -1;
}

template <class Acc>
void select_tile(const Tile& t) {
    const Blocks eligible = eligible_blocks(t);
    if (static_cast<int64_t>(eligible.size()) <= t.budget()) {
        store_list(t, eligible);
        store_estimate(t, [](int64_t, int64_t) { return 0; });
        return;
    }
    const Choice choice = choose<Acc>(t, eligible);
    store_list(t, choice.listed);
    store_estimate(t, [&](int64_t h, int64_t i) { return omitted_share<Acc>(t, h, i, choice); });
}

}  // namespace

template <class Acc>
void select_blocks(const BlockSelectParams& params) {
    const Problem& p = params.problem;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t kv = 0; kv < p.kv_heads; ++kv)
            for (int64_t tile = 0; tile < num_tiles(p.query_len, p.group()); ++tile)
                select_tile<Acc>(Tile(params, b, kv, tile, tile_positions(p.group())));
}

template void select_blocks<float>(const BlockSelectParams&);
template void select_blocks<double>(const BlockSelectParams&);

}  // namespace condensate::reference
