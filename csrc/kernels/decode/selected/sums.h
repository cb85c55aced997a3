// Sums of scores: of two sets from those of each, and of all slices of an item.
#pragma once

#include "device/softmax.h"
#include "kernels/decode/selected/workspace.h"
#include "ptx/math.h"

namespace condensate::kernels::decode {

__device__ __forceinline__ ScoreSums merge(const ScoreSums& a, const ScoreSums& b) {
    const float largest = fmaxf(a.largest, b.largest);
    const float reference = device::finite_reference(largest);
    return {largest,
            a.sum * ptx::exp2_approx(a.largest - reference) +
                b.sum * ptx::exp2_approx(b.largest - reference),
            fmaxf(a.selectable, b.selectable), 0.0f};
}

// Of `count` sets, by the lanes of a warp.
__device__ __forceinline__ ScoreSums merge_all(const ScoreSums* sets, int stride, int count) {
    ScoreSums total = {-INFINITY, 0.0f, -INFINITY, 0.0f};
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
        const float4 set = __ldcg(reinterpret_cast<const float4*>(sets + int64_t{i} * stride));
        total = merge(total, {set.x, set.y, set.z, 0.0f});
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        total = merge(total, {__shfl_xor_sync(0xffffffffu, total.largest, offset),
                              __shfl_xor_sync(0xffffffffu, total.sum, offset),
                              __shfl_xor_sync(0xffffffffu, total.selectable, offset), 0.0f});
    return total;
}

}  // namespace condensate::kernels::decode
