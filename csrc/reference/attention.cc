#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/access.h"
#include "reference/far_field.h"
#include "reference/reference.h"

namespace condensate::reference {
namespace {

template <class Acc>
constexpr Acc kMinusInfinity = -std::numeric_limits<Acc>::infinity();

// What enters a row's softmax: a key, or a pool of the far field, whose score counts its keys.
template <class Acc>
struct Term {
    Acc score;
    Row value;
    int64_t block;  // of a key; -1 for a pool
};

// Softmax over the terms of one row, then the weighted values.
template <class Acc>
struct RowState {
    explicit RowState(int64_t dim) : sum_values(static_cast<size_t>(dim)) {}

    void run(const std::vector<Term<Acc>>& terms) {
        for (const Term<Acc>& term : terms)
            if (term.score > max || term.score != term.score) max = term.score;
        for (const Term<Acc>& term : terms) {
            Acc weight = std::exp(term.score - max);
            sum += weight;
            for (size_t d = 0; d < sum_values.size(); ++d)
                sum_values[d] += weight * static_cast<Acc>(term.value[static_cast<int64_t>(d)]);
        }
    }

    Acc max = kMinusInfinity<Acc>;
    Acc sum = 0;
    std::vector<Acc> sum_values;
};

bool is_selected(const AttentionParams& params, int64_t row, int64_t key, float score) {
    if (params.threshold == nullptr) return false;
    return score > params.threshold[row] ||
           (score == params.threshold[row] && key <= params.tie_index[row]);
}

// What the rows of a tile share: the blocks of which they attend every visible key, and the pools
// that stand for others.
struct TileBlocks {
    std::vector<char> whole;  // a flag per block
    std::vector<CondensedPool> pools;
    std::vector<int64_t> sampled;  // for the estimate of the omitted mass
};

// The scores of the terms for which `counts`.
template <class Acc, class Counts>
std::vector<Acc> scores_of(const std::vector<Term<Acc>>& terms, const Counts& counts) {
    std::vector<Acc> scores;
    for (const Term<Acc>& term : terms)
        if (counts(term)) scores.push_back(term.score);
    return scores;
}

// The mean over the tile's sampled blocks of how far their keys outweigh their mean score, in log.
template <class Acc>
Acc jensen_gap(const std::vector<Term<Acc>>& terms, Acc max, const std::vector<int64_t>& sampled) {
    Acc sum = 0, blocks = 0;
    for (int64_t block : sampled) {
        const std::vector<Acc> scores =
            scores_of(terms, [&](const Term<Acc>& term) { return term.block == block; });
        const Acc whole = log_sum(scores);
        if (!(whole >= max + std::log(static_cast<Acc>(kGapLeastWeight)))) continue;
        const Acc mean = std::accumulate(scores.begin(), scores.end(), Acc{0}) / kBlockKeys;
        sum += whole - std::log(static_cast<Acc>(kBlockKeys)) - mean;
        blocks += 1;
    }
    const Acc mean = sum / blocks;
    return std::isfinite(mean) ? mean : 0;
}

// The share of the softmax that the pools' keys have, by the pools' weight and the gap.
template <class Acc>
Acc omitted_share(const std::vector<Term<Acc>>& terms, Acc max, const TileBlocks& blocks) {
    if (blocks.pools.empty() || !std::isfinite(max)) return 0;
    const Acc pools = log_sum(scores_of(terms, [](const Term<Acc>& t) { return t.block < 0; }));
    const Acc kept = log_sum(scores_of(terms, [](const Term<Acc>& t) { return t.block >= 0; }));
    return 1 / (1 + std::exp(kept - pools - jensen_gap(terms, max, blocks.sampled)));
}

template <class Acc>
void attend_row(const AttentionParams& params, int64_t b, int64_t h, int64_t i,
                const TileBlocks& blocks) {
    const Problem& p = params.problem;
    const Ranges ranges = p.ranges();
    const int64_t kv_head = h / p.group();
    const int64_t row = (b * p.query_heads + h) * p.query_len + i;
    const int64_t position = query_position(i, p.query_len, p.kv_len);
    const Row query = row_of(params.query, p.dtype, b, h, i);

    std::vector<Term<Acc>> terms;
    for (int64_t j = 0; j < p.kv_len; ++j) {
        if (!is_visible(ranges, position, j)) continue;
        Row key = row_of(params.key, p.dtype, b, kv_head, j);
        Acc score = static_cast<Acc>(p.scale) * dot<Acc>(query, key, p.head_dim);
        // Selection compares float32 scores, as select_tokens does.
        bool selected = blocks.whole[static_cast<size_t>(j / kBlockKeys)] != 0 ||
                        is_selected(params, row, j, static_cast<float>(score));
        if (!in_support(ranges, position, j, selected)) continue;
        terms.push_back({score, row_of(params.value, p.dtype, b, kv_head, j), j / kBlockKeys});
    }
    for (const CondensedPool& pool : blocks.pools) {
        Acc score = static_cast<Acc>(p.scale) * dot<Acc>(query, pool.key, p.head_dim);
        terms.push_back({score + std::log(static_cast<Acc>(pool.keys)),
                         {DType::kFloat32, pool.value.data(), 0},
                         -1});
    }

    RowState<Acc> state(p.head_dim);
    state.run(terms);
    const bool empty = state.max == kMinusInfinity<Acc>;  // no term, or none of nonzero weight
    for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc out = empty ? 0 : state.sum_values[static_cast<size_t>(d)] / state.sum;
        store_number(p.dtype, params.out, row * p.head_dim + d, static_cast<float>(out));
    }
    if (params.lse != nullptr)
        params.lse[row] = static_cast<float>(empty ? state.max : state.max + std::log(state.sum));
    if (params.omitted_mass_estimate != nullptr)
        params.omitted_mass_estimate[row] =
            static_cast<float>(omitted_share(terms, state.max, blocks));
}

void add_range(BlockRange range, std::vector<char>* blocks) {
    for (int64_t block = range.begin; block < range.end; ++block)
        (*blocks)[static_cast<size_t>(block)] = 1;
}

// Of the valid entries of the tile's list, flagged in `listed`, every gap_stride-th, as far as all
// rows see it whole.
std::vector<int64_t> sampled_blocks(const AttentionParams& params, int64_t list, TileSpan span,
                                    const std::vector<char>& listed) {
    const Problem& p = params.problem;
    std::vector<int64_t> sampled;
    if (params.max_blocks == 0 || params.block_counts == nullptr) return sampled;
    const int64_t count = max_i64(min_i64(params.block_counts[list], params.max_blocks), 0);
    int64_t entry = 0;
    for (int64_t block = 0; block < num_blocks(p.kv_len); ++block) {
        if (listed[static_cast<size_t>(block)] == 0) continue;
        if (entry++ % gap_stride(count) == 0 && block < far_end(p.ranges(), span) &&
            block_keys(p.kv_len, block) == kBlockKeys)
            sampled.push_back(block);
    }
    return sampled;
}

// With the far field a tile attends whatever it walks in whole blocks, and condenses the rest.
template <class Acc>
void add_far_field(const AttentionParams& params, int64_t b, int64_t kv, int64_t tile, int64_t list,
                   TileBlocks* blocks) {
    const Problem& p = params.problem;
    const TileSpan span = tile_span(tile, tile_positions(p.group()), p.query_len, p.kv_len);
    blocks->sampled = sampled_blocks(params, list, span, blocks->whole);
    add_range(anchor_blocks(p.ranges(), span), &blocks->whole);
    add_range(window_blocks(p.ranges(), span), &blocks->whole);
    blocks->pools = condense<Acc>(params, b, kv, span, blocks->whole);
}

}  // namespace

std::vector<char> listed_blocks(const int32_t* indices, int32_t count, int64_t max_blocks,
                                int64_t blocks, uint32_t* errors) {
    std::vector<char> listed(static_cast<size_t>(blocks), 0);
    if (count < 0 || count > max_blocks) {
        *errors |= kErrorBlockCount;
        count = count < 0 ? 0 : static_cast<int32_t>(max_blocks);
    }
    int64_t previous = -1;
    for (int32_t n = 0; n < count; ++n) {
        if (indices[n] <= previous || indices[n] >= blocks) {
            *errors |= kErrorBlockIndex;
            continue;
        }
        previous = indices[n];
        listed[static_cast<size_t>(previous)] = 1;
    }
    return listed;
}

template <class Acc>
void attention(const AttentionParams& params, uint32_t* errors) {
    const Problem& p = params.problem;
    const int group = p.group();
    const int64_t positions = tile_positions(group), tiles = num_tiles(p.query_len, group);
    const bool has_lists = params.block_counts != nullptr;
    const std::vector<char> none(static_cast<size_t>(num_blocks(p.kv_len)), 0);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t kv = 0; kv < p.kv_heads; ++kv)
            for (int64_t tile = 0; tile < tiles; ++tile) {
                int64_t list = (b * p.kv_heads + kv) * tiles + tile;
                TileBlocks blocks{none, {}, {}};
                if (has_lists)
                    blocks.whole = listed_blocks(params.block_indices + list * params.max_blocks,
                                                 params.block_counts[list], params.max_blocks,
                                                 num_blocks(p.kv_len), errors);
                if (params.far_field.key.given())
                    add_far_field<Acc>(params, b, kv, tile, list, &blocks);
                int64_t end = min_i64((tile + 1) * positions, p.query_len);
                for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
                    for (int64_t i = tile * positions; i < end; ++i)
                        attend_row<Acc>(params, b, h, i, blocks);
            }
}

template void attention<float>(const AttentionParams&, uint32_t*);
template void attention<double>(const AttentionParams&, uint32_t*);

}  // namespace condensate::reference
