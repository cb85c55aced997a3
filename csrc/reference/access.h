// What the reference's stages share: one row, one scalar product, one log-sum-exp, no layout
// tricks.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "condensate/params.h"
#include "host/number.h"

namespace condensate::reference {

// One [head_dim] row of a [batch, heads, seq, head_dim] tensor.
struct Row {
    DType dtype;
    const void* data;
    int64_t offset;
    float operator[](int64_t d) const { return load_number(dtype, data, offset + d); }
};

inline Row row_of(const ConstTensor4& tensor, DType dtype, int64_t batch, int64_t head,
                  int64_t index) {
    return {dtype, tensor.data,
            batch * tensor.stride_batch + head * tensor.stride_head + index * tensor.stride_seq};
}

template <class Acc, class A, class B>
Acc dot(const A& a, const B& b, int64_t dim) {
    Acc sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += static_cast<Acc>(a[d]) * static_cast<Acc>(b[d]);
    return sum;
}

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

}  // namespace condensate::reference
