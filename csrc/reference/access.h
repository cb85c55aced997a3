// Element access for the reference: one scalar product, one row, no layout tricks.
#pragma once

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

}  // namespace condensate::reference
