#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/access.h"
#include "reference/reference.h"

namespace condensate::reference {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One averaged query of a tile: its vector as scored, and the position that decides visibility.
struct Pool {
    std::vector<float> query;
    int64_t last_position;
};

// Quest scores by max(q,0)·max + min(q,0)·min: a dot product over a vector of twice the size.
std::vector<float> scoring_vector(const std::vector<float>& mean, Selector selector) {
    if (selector != Selector::kQuest) return mean;
    std::vector<float> split;
    for (float x : mean) split.push_back(x > 0 || x != x ? x : 0.0f);
    for (float x : mean) split.push_back(x < 0 || x != x ? x : 0.0f);
    return split;
}

template <class Acc>
Pool make_pool(const BlockSelectParams& params, int64_t b, int64_t h, int64_t begin, int64_t end) {
    const Problem& p = params.problem;
    std::vector<float> mean;
    for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc sum = 0;
        for (int64_t i = begin; i < end; ++i)
            sum += static_cast<Acc>(row_of(params.query, p.dtype, b, h, i)[d]);
        mean.push_back(round_to(p.dtype, static_cast<float>(sum / static_cast<Acc>(end - begin))));
    }
    return {scoring_vector(mean, params.selector), query_position(end - 1, p.query_len, p.kv_len)};
}

// Softmax mass of every block for one pooled query; 0 where nothing is visible or finite.
template <class Acc>
std::vector<Acc> block_masses(const BlockSelectParams& params, const Pool& pool,
                              int64_t unit_offset) {
    const Problem& p = params.problem;
    const int64_t blocks = num_blocks(p.kv_len);
    const int per_block = units_per_block(params.selector), keys = unit_keys(params.selector);
    const int64_t dim = summary_dim(params.selector, static_cast<int>(p.head_dim));
    std::vector<std::vector<Acc>> scores(static_cast<size_t>(blocks));
    Acc max = -std::numeric_limits<Acc>::infinity();
    for (int64_t block = 0; block < blocks; ++block) {
        std::vector<Acc>& visible = scores[static_cast<size_t>(block)];
        for (int64_t unit = block * per_block; unit < (block + 1) * per_block; ++unit) {
            if (!is_unit_visible(p.ranges(), pool.last_position, unit, keys)) continue;
            Row summary{p.dtype, params.summaries, (unit_offset + unit) * dim};
            visible.push_back(static_cast<Acc>(p.scale) * dot<Acc>(pool.query, summary, dim));
        }
        auto is_finite = [](Acc score) { return std::isfinite(score); };
        if (!std::all_of(visible.begin(), visible.end(), is_finite)) visible.clear();
        for (Acc score : visible) max = std::max(max, score);
    }
    std::vector<Acc> mass(static_cast<size_t>(blocks), 0);
    Acc total = 0;
    for (size_t block = 0; block < mass.size(); ++block) {
        for (Acc score : scores[block]) mass[block] += std::exp(score - max);
        total += mass[block];
    }
    for (Acc& m : mass) m = total > 0 ? m / total : 0;
    return mass;
}

// The eligible blocks of largest mass, ties to the lower index, ascending.
template <class Acc>
std::vector<int64_t> top_blocks(const std::vector<Acc>& mass, const Ranges& ranges, TileSpan span,
                                int64_t max_blocks) {
    std::vector<int64_t> order;
    for (int64_t block = 0; block < static_cast<int64_t>(mass.size()); ++block)
        if (is_eligible(ranges, span, block)) order.push_back(block);
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
        return mass[static_cast<size_t>(x)] > mass[static_cast<size_t>(y)];
    });
    if (static_cast<int64_t>(order.size()) > max_blocks)
        order.resize(static_cast<size_t>(max_blocks));
    std::sort(order.begin(), order.end());
    return order;
}

// Mass of the eligible blocks that were not taken.
template <class Acc>
Acc mass_left_out(const std::vector<Acc>& mass, const std::vector<int64_t>& taken,
                  const Ranges& ranges, TileSpan span) {
    Acc left_out = 0;
    for (int64_t block = 0; block < static_cast<int64_t>(mass.size()); ++block)
        if (is_eligible(ranges, span, block) &&
            !std::binary_search(taken.begin(), taken.end(), block))
            left_out += mass[static_cast<size_t>(block)];
    return left_out;
}

template <class Acc>
void select_tile(const BlockSelectParams& params, int64_t b, int64_t kv, int64_t tile) {
    const Problem& p = params.problem;
    const int group = p.group(), pool_size = query_pool(group);
    const int64_t positions = tile_positions(group), tiles = num_tiles(p.query_len, group);
    const int64_t begin = tile * positions, end = min_i64(begin + positions, p.query_len);
    const int64_t unit_offset = (b * p.kv_heads + kv) * summary_units(params.selector, p.kv_len);
    const TileSpan span = tile_span(tile, static_cast<int>(positions), p.query_len, p.kv_len);

    std::vector<std::vector<Acc>> masses;  // by head of the group, then pool
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t i = begin; i < end; i += pool_size)
            masses.push_back(block_masses<Acc>(
                params, make_pool<Acc>(params, b, h, i, min_i64(i + pool_size, end)), unit_offset));
    std::vector<Acc> tile_mass(static_cast<size_t>(num_blocks(p.kv_len)), 0);
    for (const std::vector<Acc>& mass : masses)
        for (size_t block = 0; block < mass.size(); ++block)
            tile_mass[block] = std::max(tile_mass[block], mass[block]);

    std::vector<int64_t> taken = top_blocks(tile_mass, p.ranges(), span, params.max_blocks);
    const int64_t list = (b * p.kv_heads + kv) * tiles + tile;
    params.block_counts[list] = static_cast<int32_t>(taken.size());
    for (size_t n = 0; n < static_cast<size_t>(params.max_blocks); ++n)
        params.block_indices[list * params.max_blocks + static_cast<int64_t>(n)] =
            n < taken.size() ? static_cast<int32_t>(taken[n]) : -1;

    if (params.omitted_mass_estimate == nullptr) return;
    const int64_t pools = ceil_div(end - begin, pool_size);
    for (int64_t g = 0; g < group; ++g)
        for (int64_t i = begin; i < end; ++i) {
            size_t pool = static_cast<size_t>(g * pools + (i - begin) / pool_size);
            Acc left_out = mass_left_out(masses[pool], taken, p.ranges(), span);
            int64_t row = (b * p.query_heads + kv * group + g) * p.query_len + i;
            params.omitted_mass_estimate[row] = static_cast<float>(left_out);
        }
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
                select_tile<Acc>(params, b, kv, tile);
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
