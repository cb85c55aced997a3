// What a list depends on: the queries of a tile, and masses of blocks for them, as logarithms.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/access.h"

namespace condensate::reference {

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
        whole = params.whole_blocks(positions);
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
    int tile_pool() const { return pool_size(params.problem.group()); }
    int64_t budget() const { return params.head_blocks(kv_head); }
    Ranges ranges() const { return params.problem.ranges(); }
    int64_t first_head() const { return kv_head * params.problem.group(); }
    int64_t end_head() const { return first_head() + params.problem.group(); }

    const BlockSelectParams& params;
    int64_t b, kv_head, begin, end;
    TileSpan span;
    WholeBlocks whole;  // that no list needs
};

// ---- Queries ----

// Quest scores by max(q,0)·max + min(q,0)·min: a dot product over a vector of twice the size.
inline std::vector<float> scoring_vector(const std::vector<float>& mean, Selector selector) {
    if (selector_traits(selector).content != UnitContent::kBounds) return mean;
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

// The same over the keys of a block that the query sees.
template <class Acc>
Acc log_sum_of_keys(const Tile& t, const Query& query, int64_t block) {
    const Problem& p = t.params.problem;
    const int64_t begin = block * kBlockKeys, end = min_i64(begin + kBlockKeys, p.kv_len);
    std::vector<Acc> scores;
    for (int64_t j = begin; j < end; ++j) {
        if (!is_visible(p.ranges(), query.position, j)) continue;
        const Row key = row_of(t.params.key, p.dtype, t.b, t.kv_head, j);
        scores.push_back(static_cast<Acc>(p.scale) * dot<Acc>(query.vector, key, p.head_dim));
    }
    return log_sum(scores);
}

// The block's largest score; NaN is none.
template <class Acc>
Acc hottest(const Tile& t, const Query& query, UnitLevel level, int64_t block) {
    std::vector<Acc> scores;
    add_scores(t, query, level, block, &scores);
    Acc largest = -std::numeric_limits<Acc>::infinity();
    for (Acc score : scores)
        if (score > largest) largest = score;
    return largest;
}

// exp(part - whole) as the definition bounds it.
template <class Acc>
Acc mass_of(Acc part, Acc whole) {
    if (!std::isfinite(whole) || part != part) return 0;
    return std::min(std::exp(part - whole), static_cast<Acc>(std::numeric_limits<float>::max()));
}

template <class Acc>
struct Weighed {
    int64_t block;
    Acc mass;
};
template <class Acc>
using WeighedBlocks = std::vector<Weighed<Acc>>;

// The largest mass over the queries of every block of `blocks`, relative to the norm units of
// `whole`. log_of(query, block) is what a block comes to, as a logarithm.
template <class Acc, class LogOf>
WeighedBlocks<Acc> weigh(const Tile& t, const std::vector<Query>& queries, UnitLevel norm,
                         const Blocks& whole, const Blocks& blocks, const LogOf& log_of) {
    WeighedBlocks<Acc> weighed;
    for (int64_t block : blocks) weighed.push_back({block, 0});
    for (const Query& query : queries) {
        const Acc sum = log_sum_of<Acc>(t, query, norm, whole);
        for (Weighed<Acc>& w : weighed)
            w.mass = std::max(w.mass, mass_of<Acc>(log_of(query, w.block), sum));
    }
    return weighed;
}

}  // namespace condensate::reference
