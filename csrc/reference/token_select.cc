#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/access.h"
#include "reference/reference.h"

namespace condensate::reference {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
void select_tokens(const TokenSelectParams& params) {
    const Problem& p = params.problem;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.query_heads; ++h)
            for (int64_t i = 0; i < p.query_len; ++i) select_row<Acc>(params, b, h, i);
}

template void select_tokens<float>(const TokenSelectParams&);
template void select_tokens<double>(const TokenSelectParams&);

}  // namespace condensate::reference
