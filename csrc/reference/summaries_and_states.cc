#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/access.h"
#include "reference/reference.h"

namespace condensate::reference {
namespace {

// One element of one unit: the mean, or of bounds the maximum and the minimum (NaN wins).
template <class Acc>
void summarise(const BlockSummaryParams& params, int64_t b, int64_t h, UnitLevel level,
               int64_t unit, int64_t d) {
    const int64_t begin = unit * level.keys, end = min_i64(begin + level.keys, params.kv_len);
    Acc sum = 0;
    float high = 0, low = 0;
    for (int64_t j = begin; j < end; ++j) {
        float x = row_of(params.key, params.dtype, b, h, j)[d];
        sum += static_cast<Acc>(x);
        if (j == begin || x > high || x != x) high = x;
        if (j == begin || x < low || x != x) low = x;
    }
    const int64_t rows = summary_rows(params.selector, params.kv_len);
    const int64_t row = summary_row(level, rows_per_block(params.selector), unit);
    const int64_t dim = summary_dim(params.selector, static_cast<int>(params.head_dim));
    const int64_t at = ((b * params.kv_heads + h) * rows + row) * dim + d;
    if (selector_traits(params.selector).content == UnitContent::kBounds) {
        store_number(params.dtype, params.summaries, at, high);
        store_number(params.dtype, params.summaries, at + params.head_dim, low);
    } else {
        Acc mean = begin < end ? sum / static_cast<Acc>(end - begin) : 0;
        store_number(params.dtype, params.summaries, at, static_cast<float>(mean));
    }
}

std::vector<UnitLevel> levels_of(Selector selector) {
    const ScoringLevels levels = scan_levels(selector);
    if (!has_two_levels(selector)) return {levels.mass};
    return {levels.mass, levels.norm};
}

}  // namespace

template <class Acc>
void block_summaries(const BlockSummaryParams& params) {
    for (int64_t b = 0; b < params.batch; ++b)
        for (int64_t h = 0; h < params.kv_heads; ++h)
            for (UnitLevel level : levels_of(params.selector))
                for (int64_t unit = 0; unit < num_blocks(params.kv_len) * level.per_block; ++unit)
                    for (int64_t d = 0; d < params.head_dim; ++d)
                        summarise<Acc>(params, b, h, level, unit, d);
}

template <class Acc>
void omitted_mass(const OmittedMassParams& params, uint32_t* errors) {
    const Problem& p = params.problem;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.query_heads; ++h)
            for (int64_t r = 0; r < params.num_rows; ++r) {
                float* omitted = params.omitted + (b * p.query_heads + h) * params.num_rows + r;
                int64_t i = params.rows != nullptr ? params.rows[r] : r;
                if (i < 0 || i >= p.query_len) {
                    *errors |= kErrorRowIndex;
                    *omitted = std::numeric_limits<float>::quiet_NaN();
                    continue;
                }
                *omitted = 0;
                // Relative to the support's own LSE no maximum is needed: the sum is
                // exp(lse_full - lse) >= 1, infinite only where everything was left out.
                Acc lse = params.lse[(b * p.query_heads + h) * p.query_len + i];
                Acc ratio = 0;
                int64_t position = query_position(i, p.query_len, p.kv_len);
                Row query = row_of(params.query, p.dtype, b, h, i);
                for (int64_t j = 0; j < p.kv_len; ++j) {
                    if (!is_visible(p.ranges(), position, j)) continue;
                    Row key = row_of(params.key, p.dtype, b, h / p.group(), j);
                    ratio += std::exp(static_cast<Acc>(p.scale) * dot<Acc>(query, key, p.head_dim) -
                                      lse);
                }
                if (ratio == 0) continue;  // nothing is visible, so nothing is left out
                Acc mass = 1 - 1 / ratio;
                *omitted = static_cast<float>(mass < 0 ? Acc{0} : mass);
            }
}

template <class Acc>
void omitted_from_lse(const OmittedFromLseParams& params) {
    for (int64_t row = 0; row < params.rows; ++row) {
        const Acc lse = params.lse[row], lse_full = params.lse_full[row];
        // Equal also where no key is seen: both are -inf then.
        const Acc mass = lse == lse_full ? Acc{0} : 1 - std::exp(lse - lse_full);
        params.omitted[row] = static_cast<float>(mass < 0 ? Acc{0} : mass);
    }
}

template <class Acc>
void merge_states(const MergeStatesParams& params) {
    for (int64_t row = 0; row < params.rows; ++row) {
        Acc a = params.lse_a[row], b = params.lse_b[row];
        Acc max = a > b || a != a ? a : b;
        bool empty = max == -std::numeric_limits<Acc>::infinity();
        Acc weight_a = empty ? 0 : std::exp(a - max), weight_b = empty ? 0 : std::exp(b - max);
        Acc sum = weight_a + weight_b;
        params.lse[row] = static_cast<float>(empty ? max : max + std::log(sum));
        for (int64_t d = 0; d < params.head_dim; ++d) {
            int64_t at = row * params.head_dim + d;
            Acc out = 0;  // a state of weight 0 takes no part, whatever its output holds
            if (weight_a != 0)
                out +=
                    weight_a / sum * static_cast<Acc>(load_number(params.dtype, params.out_a, at));
            if (weight_b != 0)
                out +=
                    weight_b / sum * static_cast<Acc>(load_number(params.dtype, params.out_b, at));
            store_number(params.dtype, params.out, at, static_cast<float>(out));
        }
    }
}

template void block_summaries<float>(const BlockSummaryParams&);
template void block_summaries<double>(const BlockSummaryParams&);
template void omitted_mass<float>(const OmittedMassParams&, uint32_t*);
template void omitted_mass<double>(const OmittedMassParams&, uint32_t*);
template void omitted_from_lse<float>(const OmittedFromLseParams&);
template void omitted_from_lse<double>(const OmittedFromLseParams&);
template void merge_states<float>(const MergeStatesParams&);
template void merge_states<double>(const MergeStatesParams&);

}  // namespace condensate::reference
