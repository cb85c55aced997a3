#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/access.h"
#include "reference/reference.h"

namespace condensate::reference {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A query as scored, pooled or not, and the position that decides which units it sees.
struct Query {
    std::vector<float> vector;
    int64_t position;
};

using Blocks = std::vector<int64_t>;  // ascending

// One tile or scan tile of one KV head: everything that its list depends on.
struct Tile {
    Tile(const BlockSelectParams& call, int64_t batch, int64_t kv, int64_t index, int positions)
        : params(call), b(batch), kv_head(kv), begin(index * positions) {
        const Problem& p = params.problem;
        end = min_i64(begin + positions, p.query_len);
        span = tile_span(index, positions, p.query_len, p.kv_len);
    }
    Tile scan_tile() const {
        const Problem& p = params.problem;
        const int positions = scan_positions(params.selector, p.group(), p.kv_len);
        return {params, b, kv_head, begin / positions, positions};
    }
    int64_t list() const {
        const Problem& p = params.problem;
        const int positions = tile_positions(p.group());
        return (b * p.kv_heads + kv_head) * num_tiles(p.query_len, p.group()) + begin / positions;
    }
    int scan_pool() const {
        const Problem& p = params.problem;
        return scan_pool_size(params.selector, p.group(), p.kv_len);
    }
    int refinement_pool() const { return pool_size(params.problem.group(), kRefinementPool); }
    Ranges ranges() const { return params.problem.ranges(); }
    int64_t first_head() const { return kv_head * params.problem.group(); }
    int64_t end_head() const { return first_head() + params.problem.group(); }

    const BlockSelectParams& params;
    int64_t b, kv_head, begin, end;
    TileSpan span;
};

// ---- Queries ----

// Quest scores by max(q,0)·max + min(q,0)·min: a dot product over a vector of twice the size.
std::vector<float> scoring_vector(const std::vector<float>& mean, Selector selector) {
    if (selector != Selector::kQuest) return mean;
    std::vector<float> split;
    for (float x : mean) split.push_back(x > 0 || x != x ? x : 0.0f);
    for (float x : mean) split.push_back(x < 0 || x != x ? x : 0.0f);
    return split;
}

// The mean of queries first..end-1 of one head.
template <class Acc>
Query pool(const Tile& t, int64_t h, int64_t first, int64_t end) {
    const Problem& p = t.params.problem;
    std::vector<float> mean;
    for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc sum = 0;
        for (int64_t i = first; i < end; ++i)
            sum += static_cast<Acc>(row_of(t.params.query, p.dtype, t.b, h, i)[d]);
        mean.push_back(round_to(p.dtype, static_cast<float>(sum / static_cast<Acc>(end - first))));
    }
    return {scoring_vector(mean, t.params.selector),
            query_position(end - 1, p.query_len, p.kv_len)};
}

// The tile's queries by head, then position, in pools of `size`.
template <class Acc>
std::vector<Query> pooled_queries(const Tile& t, int64_t size) {
    std::vector<Query> queries;
    for (int64_t h = t.first_head(); h < t.end_head(); ++h)
        for (int64_t i = t.begin; i < t.end; i += size)
            queries.push_back(pool<Acc>(t, h, i, min_i64(i + size, t.end)));
    return queries;
}

// ---- Sums and masses, as logarithms ----

// log(sum of exp): -inf for no score, NaN with a NaN among them, +inf with a +inf.
template <class Acc>
Acc log_sum(const std::vector<Acc>& scores) {
    Acc max = -std::numeric_limits<Acc>::infinity();
    for (Acc score : scores)
        if (score > max || score != score) max = score;
    if (!std::isfinite(max)) return max;
    Acc sum = 0;
    for (Acc score : scores) sum += std::exp(score - max);
    return max + std::log(sum);
}

// Appends the query's scores of the units of a block that it sees.
template <class Acc>
void add_scores(const Tile& t, const Query& query, UnitLevel level, int64_t block,
                std::vector<Acc>* scores) {
    const Problem& p = t.params.problem;
    const Selector selector = t.params.selector;
    const int64_t rows = summary_rows(selector, p.kv_len);
    const int64_t dim = summary_dim(selector, static_cast<int>(p.head_dim));
    const int64_t first = block * level.per_block;
    for (int64_t unit = first; unit < first + level.per_block; ++unit) {
        if (!is_unit_visible(p.ranges(), query.position, unit, level.keys)) continue;
        const int64_t row = summary_row(level, rows_per_block(selector), unit);
        Row summary{p.dtype, t.params.summaries,
                    ((t.b * p.kv_heads + t.kv_head) * rows + row) * dim};
        scores->push_back(static_cast<Acc>(p.scale) * dot<Acc>(query.vector, summary, dim));
    }
}

template <class Acc>
Acc log_sum_of(const Tile& t, const Query& query, UnitLevel level, const Blocks& blocks) {
    std::vector<Acc> scores;
    for (int64_t block : blocks) add_scores(t, query, level, block, &scores);
    return log_sum(scores);
}

// Of every block in turn; one that is NaN has no mass.
template <class Acc>
std::vector<Acc> block_log_sums(const Tile& t, const Query& query, UnitLevel level,
                                const Blocks& blocks) {
    std::vector<Acc> sums;
    for (int64_t block : blocks) {
        Acc sum = log_sum_of<Acc>(t, query, level, {block});
        sums.push_back(sum == sum ? sum : -std::numeric_limits<Acc>::infinity());
    }
    return sums;
}

// Of every block in turn the largest score; NaN is none.
template <class Acc>
std::vector<Acc> block_largest(const Tile& t, const Query& query, UnitLevel level,
                               const Blocks& blocks) {
    std::vector<Acc> largest;
    for (int64_t block : blocks) {
        std::vector<Acc> scores;
        add_scores(t, query, level, block, &scores);
        largest.push_back(-std::numeric_limits<Acc>::infinity());
        for (Acc score : scores)
            if (score > largest.back()) largest.back() = score;
    }
    return largest;
}

// exp(part - whole) as the definition bounds it.
template <class Acc>
Acc mass_of(Acc part, Acc whole) {
    if (!std::isfinite(whole)) return 0;
    return std::min(std::exp(part - whole), static_cast<Acc>(std::numeric_limits<float>::max()));
}

// The largest mass over the queries of every block of `blocks`, relative to the units of `whole`.
// log_of(query, level, blocks) is what a block's units come to, as logarithms.
template <class Acc, class LogOf>
std::vector<Acc> largest_masses(const Tile& t, const std::vector<Query>& queries,
                                ScoringLevels levels, const Blocks& whole, const Blocks& blocks,
                                const LogOf& log_of) {
    std::vector<Acc> largest(blocks.size(), 0);
    for (const Query& query : queries) {
        const Acc norm = log_sum_of<Acc>(t, query, levels.norm, whole);
        const std::vector<Acc> parts = log_of(t, query, levels.mass, blocks);
        for (size_t n = 0; n < blocks.size(); ++n)
            largest[n] = std::max(largest[n], mass_of(parts[n], norm));
    }
    return largest;
}

// ---- Choosing ----

Blocks all_blocks(const Tile& t) {
    Blocks blocks;
    for (int64_t block = 0; block < num_blocks(t.ranges().kv_len); ++block) blocks.push_back(block);
    return blocks;
}

Blocks eligible_blocks(const Tile& t) {
    Blocks blocks;
    for (int64_t block : all_blocks(t))
        if (is_eligible(t.ranges(), t.span, block)) blocks.push_back(block);
    return blocks;
}

bool contains(const Blocks& blocks, int64_t block) {
    return std::binary_search(blocks.begin(), blocks.end(), block);
}

// The `width` blocks of largest mass, ties to the lower index.
template <class Acc>
Blocks heaviest(const Blocks& blocks, const std::vector<Acc>& mass, int64_t width) {
    std::vector<size_t> order(blocks.size());
    for (size_t n = 0; n < order.size(); ++n) order[n] = n;
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t x, size_t y) { return mass[x] > mass[y]; });
    Blocks taken;
    for (size_t n = 0; n < order.size() && static_cast<int64_t>(n) < width; ++n)
        taken.push_back(blocks[order[n]]);
    std::sort(taken.begin(), taken.end());
    return taken;
}

// The `width` eligible blocks whose hottest units weigh most for the scan tile's pooled queries.
template <class Acc>
Blocks scan(const Tile& t, const Blocks& eligible, int64_t width) {
    if (static_cast<int64_t>(eligible.size()) <= width) return eligible;
    const std::vector<Query> pools = pooled_queries<Acc>(t, t.scan_pool());
    return heaviest(eligible,
                    largest_masses<Acc>(t, pools, scan_levels(t.params.selector), all_blocks(t),
                                        eligible, block_largest<Acc>),
                    width);
}

// W: the shortlist and what the attention walks beside it.
Blocks walked_blocks(const Tile& t, const Blocks& shortlist) {
    const BlockRange anchors = anchor_blocks(t.ranges(), t.span);
    const BlockRange window = window_blocks(t.ranges(), t.span);
    Blocks walked;
    for (int64_t block : all_blocks(t))
        if (contains(shortlist, block) || (block >= anchors.begin && block < anchors.end) ||
            (block >= window.begin && block < window.end))
            walked.push_back(block);
    return walked;
}

// The `width` shortlisted blocks that pairs of queries find heaviest.
template <class Acc>
Blocks refine(const Tile& t, const Blocks& shortlist, int64_t width) {
    const std::vector<Query> queries = pooled_queries<Acc>(t, t.refinement_pool());
    return heaviest(shortlist,
                    largest_masses<Acc>(t, queries, kRefinementLevels, walked_blocks(t, shortlist),
                                        shortlist, block_log_sums<Acc>),
                    width);
}

// ---- What is left out ----

// A pooled query's share outside the list, from the scores of the scan.
template <class Acc>
Acc scanned_omission(const Tile& t, const Query& pooled, const Blocks& left_out) {
    const ScoringLevels levels = scan_levels(t.params.selector);
    return mass_of(log_sum(block_log_sums<Acc>(t, pooled, levels.mass, left_out)),
                   log_sum_of<Acc>(t, pooled, levels.norm, all_blocks(t)));
}

// What was seen of all blocks while a list was made.
struct Looks {
    Blocks walked;    // W
    Blocks unwalked;  // outside the scan tile's W
};

// A query's share outside the list: fine units inside W, and outside of the scan tile's four times
// the middle units of its pooled query, which stand for sixteen keys where fine ones stand for
// four.
template <class Acc>
Acc refined_omission(const Tile& t, const Query& query, const Query& pooled, const Blocks& left_out,
                     const Looks& looks) {
    Blocks left_in_walk;
    for (int64_t block : left_out)
        if (contains(looks.walked, block)) left_in_walk.push_back(block);
    const Acc rest =
        std::log(Acc{4}) + log_sum(block_log_sums<Acc>(t, pooled, kMiddleUnits, looks.unwalked));
    std::vector<Acc> all = block_log_sums<Acc>(t, query, kFineUnits, looks.walked);
    std::vector<Acc> left = block_log_sums<Acc>(t, query, kFineUnits, left_in_walk);
    all.push_back(rest);
    left.push_back(rest);
    return mass_of(log_sum(left), log_sum(all));
}

// The mean of the tile's pool of `size` queries that query i of head h belongs to.
template <class Acc>
Query pool_around(const Tile& t, int64_t h, int64_t i, int64_t size) {
    const int64_t first = t.begin + (i - t.begin) / size * size;
    return pool<Acc>(t, h, first, min_i64(first + size, t.end));
}

template <class Acc>
void store_estimate(const Tile& t, const Blocks& left_out, const Looks& looks) {
    const Problem& p = t.params.problem;
    for (int64_t h = t.first_head(); h < t.end_head(); ++h)
        for (int64_t i = t.begin; i < t.end; ++i) {
            Acc omitted = 0;
            if (!left_out.empty()) {
                const Query scanned = pool_around<Acc>(t.scan_tile(), h, i, t.scan_pool());
                const Query refined = pool_around<Acc>(t, h, i, t.refinement_pool());
                omitted = t.params.selector == Selector::kBlock
                              ? refined_omission<Acc>(t, refined, scanned, left_out, looks)
                              : scanned_omission<Acc>(t, scanned, left_out);
            }
            t.params.omitted_mass_estimate[(t.b * p.query_heads + h) * p.query_len + i] =
                static_cast<float>(omitted);
        }
}

void store_list(const Tile& t, const Blocks& taken) {
    t.params.block_counts[t.list()] = static_cast<int32_t>(taken.size());
    int32_t* indices = t.params.block_indices + t.list() * t.params.max_blocks;
    for (size_t n = 0; n < static_cast<size_t>(t.params.max_blocks); ++n)
        indices[n] = n < taken.size() ? static_cast<int32_t>(taken[n]) : -1;
}

// The list of more eligible blocks than it holds.
template <class Acc>
Blocks choose(const Tile& t, const Blocks& eligible, Looks* looks) {
    const int64_t width = t.params.max_blocks;
    if (t.params.selector != Selector::kBlock) return scan<Acc>(t, eligible, width);
    const Tile s = t.scan_tile();
    const Blocks scanned = scan<Acc>(s, eligible_blocks(s), shortlist_width(width));
    Blocks shortlist;
    for (int64_t block : scanned)
        if (contains(eligible, block)) shortlist.push_back(block);
    looks->walked = walked_blocks(t, shortlist);
    const Blocks walked = walked_blocks(s, scanned);
    for (int64_t block : all_blocks(t))
        if (!contains(walked, block)) looks->unwalked.push_back(block);
    return refine<Acc>(t, shortlist, width);
}

template <class Acc>
void select_tile(const Tile& t) {
    const Blocks eligible = eligible_blocks(t);
    Blocks taken = eligible;
    Looks looks;
    if (static_cast<int64_t>(eligible.size()) > t.params.max_blocks)
        taken = choose<Acc>(t, eligible, &looks);
    store_list(t, taken);
    if (t.params.omitted_mass_estimate == nullptr) return;
    Blocks left_out;
    for (int64_t block : eligible)
        if (!contains(taken, block)) left_out.push_back(block);
    store_estimate<Acc>(t, left_out, looks);
}

struct Candidate {
    float score;
    int64_t key;
    bool operator<(const Candidate& other) const {  // better first; never holds NaN
        return score > other.score || (score == other.score && key < other.key);
    }
};

template <class Acc>
void select_row(const TokenSelectParams& params, int64_t b, int64_t h, int64_t i) {
    const Problem& p = params.problem;
    const int64_t position = query_position(i, p.query_len, p.kv_len);
    const int64_t row = (b * p.query_heads + h) * p.query_len + i;
    const Row query = row_of(params.query, p.dtype, b, h, i);
    std::vector<Candidate> candidates;
    std::vector<Acc> scores;
    Acc max = -std::numeric_limits<Acc>::infinity();
    for (int64_t j = 0; j < p.kv_len; ++j) {
        if (!is_visible(p.ranges(), position, j)) continue;
        Row key = row_of(params.key, p.dtype, b, h / p.group(), j);
        Acc score = static_cast<Acc>(p.scale) * dot<Acc>(query, key, p.head_dim);
        scores.push_back(score);
        if (score > max || score != score) max = score;
        if (score == score && !in_ranges(p.ranges(), position, j))
            candidates.push_back({static_cast<float>(score), j});
    }

    const bool all = static_cast<int64_t>(candidates.size()) < params.topk;
    params.threshold[row] = all ? -kInfinity : kInfinity;
    params.tie_index[row] = all ? std::numeric_limits<int32_t>::max() : -1;
    if (!all && params.topk > 0) {
        auto last = candidates.begin() + (params.topk - 1);
        std::nth_element(candidates.begin(), last, candidates.end());
        params.threshold[row] = last->score;
        params.tie_index[row] = static_cast<int32_t>(last->key);
    }
    if (params.lse_full == nullptr) return;
    Acc sum = 0;
    for (Acc score : scores) sum += std::exp(score - max);
    params.lse_full[row] = scores.empty() ? -kInfinity : static_cast<float>(max + std::log(sum));
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

template <class Acc>
void select_tokens(const TokenSelectParams& params) {
    const Problem& p = params.problem;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.query_heads; ++h)
            for (int64_t i = 0; i < p.query_len; ++i) select_row<Acc>(params, b, h, i);
}

template void select_blocks<float>(const BlockSelectParams&);
template void select_blocks<double>(const BlockSelectParams&);
template void select_tokens<float>(const TokenSelectParams&);
template void select_tokens<double>(const TokenSelectParams&);

}  // namespace condensate::reference
