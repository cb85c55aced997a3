// Merges two attention results over disjoint supports, row by row, in one pass over memory.
#include "device/element.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace {

constexpr int kThreads = 256;

struct MergeWeights {
    float a;
    float b;
    float lse;
};

// exp(lse - lse_union) of both sides. A side that is empty (-inf) weighs 0; NaN spreads.
__device__ MergeWeights merge_weights(float lse_a, float lse_b) {
    if (lse_a == -INFINITY && lse_b == -INFINITY) return {0.0f, 0.0f, -INFINITY};
    float high = fmaxf(lse_a, lse_b);
    float exp_a = expf(lse_a - high);
    float exp_b = expf(lse_b - high);
    float sum = exp_a + exp_b;
    return {exp_a / sum, exp_b / sum, high + logf(sum)};
}

// A side of weight 0 takes no part, whatever its output holds.
template <class T>
__device__ float weigh(float weight, T value) {
    return weight == 0.0f ? 0.0f : weight * to_float(value);
}

// One thread owns kElems channels of one row.
template <class T, int kElems>
__global__ void __launch_bounds__(kThreads)
    merge_states_kernel(MergeStatesParams params, int chunks, int rows_per_cta) {
    using Chunk = Vec<T, kElems>;
    int row_in_cta = static_cast<int>(threadIdx.x) / chunks;
    int chunk = static_cast<int>(threadIdx.x) % chunks;
    int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_cta + row_in_cta;
    if (row_in_cta >= rows_per_cta || row >= params.rows) return;

    float lse_a = params.lse_a[row];
    float lse_b = params.lse_b[row];
    int64_t offset = row * chunks + chunk;
    Chunk a = static_cast<const Chunk*>(params.out_a)[offset];
    Chunk b = static_cast<const Chunk*>(params.out_b)[offset];
    MergeWeights weights = merge_weights(lse_a, lse_b);
    Chunk merged;
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
        merged.elem[e] = from_float<T>(weigh(weights.a, a.elem[e]) + weigh(weights.b, b.elem[e]));
    }
    static_cast<Chunk*>(params.out)[offset] = merged;
    if (chunk == 0) params.lse[row] = weights.lse;
}

template <class T, int kElems>
Status launch_merge(const MergeStatesParams& params, const LaunchContext& context) {
    int chunks = static_cast<int>(params.head_dim / kElems);
    if (chunks == 0) return {};
    int rows_per_cta = kThreads / chunks;
    return launch(merge_states_kernel<T, kElems>, "merge_states",
                  {ceil_div(params.rows, rows_per_cta)}, kThreads, 0, context, params, chunks,
                  rows_per_cta);
}

}  // namespace

Status merge_states(const MergeStatesParams& params, const LaunchContext& context) {
    return with_element_type(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        bool wide = is_wide_aligned(params.out_a) && is_wide_aligned(params.out_b) &&
                    is_wide_aligned(params.out);
        return wide ? launch_merge<T, kWideBytes / static_cast<int>(sizeof(T))>(params, context)
                    : launch_merge<T, 1>(params, context);
    });
}

}  // namespace condensate::kernels
