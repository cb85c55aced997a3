// What the layout of a tensor allows: vector loads, TMA boxes. An extent of 1 is never stepped
// over, so its stride may be anything.
#pragma once

#include <cstdint>

#include "condensate/params.h"

namespace condensate {

struct Extents {
    int64_t batch, heads, length;
};
inline Extents query_extents(const Problem& p) { return {p.batch, p.query_heads, p.query_len}; }
inline Extents key_extents(const Problem& p) { return {p.batch, p.kv_heads, p.kv_len}; }

inline bool is_aligned16(const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}
// Are all rows multiples of 16 bytes away from 0, as vector loads need?
inline bool is_aligned16(const ConstTensor4& tensor, DType dtype, const Extents& extents) {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    auto steps_well = [&](int64_t extent, int64_t stride) {
        return extent <= 1 || stride * bytes % 16 == 0;
    };
    return is_aligned16(tensor.data) && steps_well(extents.batch, tensor.stride_batch) &&
           steps_well(extents.heads, tensor.stride_head) &&
           steps_well(extents.length, tensor.stride_seq);
}
inline bool is_aligned16(const BlockMeans& means, DType dtype, int64_t heads, int64_t blocks) {
    return is_aligned16({means.data, 0, means.stride_head, means.stride_block}, dtype,
                        {1, heads, blocks});
}

// Can TMA cut boxes out of it?
inline bool is_boxed(const ConstTensor4& tensor, const Extents& extents) {
    auto steps_forward = [](int64_t extent, int64_t stride) { return extent <= 1 || stride > 0; };
    return steps_forward(extents.batch, tensor.stride_batch) &&
           steps_forward(extents.heads, tensor.stride_head) &&
           steps_forward(extents.length, tensor.stride_seq);
}

}  // namespace condensate
