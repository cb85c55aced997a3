// Merges two attention results over disjoint supports, row by row.
#include <cmath>

#include "condensate/geometry.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "host/number.h"

namespace condensate::cpu {
namespace {

constexpr int64_t kRowsPerItem = 256;

struct Weights {
    float a, b, lse;
};

Weights weights_of(float lse_a, float lse_b) {
    const float max = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;
    if (max == -INFINITY) return {0.0f, 0.0f, max};
    const float a = std::exp(lse_a - max), b = std::exp(lse_b - max), sum = a + b;
    return {a / sum, b / sum, max + std::log(sum)};
}

void merge_row(const MergeStatesParams& p, int64_t row) {
    const Weights w = weights_of(p.lse_a[row], p.lse_b[row]);
    p.lse[row] = w.lse;
    for (int64_t at = row * p.head_dim; at < (row + 1) * p.head_dim; ++at) {
        float out = 0.0f;  // a state of weight 0 takes no part, whatever its output holds
        if (w.a != 0.0f) out += w.a * load_number(p.dtype, p.out_a, at);
        if (w.b != 0.0f) out += w.b * load_number(p.dtype, p.out_b, at);
        store_number(p.dtype, p.out, at, out);
    }
}

}  // namespace

Status merge_states(const MergeStatesParams& params, const Executor& executor) {
    return for_each_item(
        executor, ceil_div(params.rows, kRowsPerItem), [](Arena&) { return 0; },
        [&](int64_t item, int) {
            const int64_t end = min_i64((item + 1) * kRowsPerItem, params.rows);
            for (int64_t row = item * kRowsPerItem; row < end; ++row) merge_row(params, row);
        });
}

}  // namespace condensate::cpu
