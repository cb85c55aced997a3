// Adds up the splits of a row in ascending order and writes its output and LSE.
#pragma once

#include <cmath>

#include "condensate/decode.h"
#include "device/element.h"
#include "device/softmax.h"
#include "kernels/decode/dense/splits.h"

namespace condensate::kernels::decode {

constexpr int kCombineThreads = 128;

template <int kDim>
struct CombineSmem {
    static constexpr int kQuads = kDim / 4;                   // threads that share a row
    static constexpr int kGroups = kCombineThreads / kQuads;  // every kGroups-th split each
    float weight[kMaxSplits];
    float4 part[kGroups][kQuads];
    float shared[kCombineThreads / 32];
};

// Of all threads; `shared` holds a value a warp.
template <class Op>
__device__ __forceinline__ float reduce_cta(float x, float* shared, Op&& op) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
    __syncthreads();  // an earlier reduction has been read
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
#pragma unroll
    for (int w = 1; w < kCombineThreads / 32; ++w) x = op(x, shared[w]);
    return x;
}

struct CombinedRow {
    int32_t batch, head, query;
    int32_t splits;
    bool sees_keys;
    int64_t partial, partial_stride;  // rows of the first split, and to the next

    __device__ CombinedRow(const DecodeParams& params, const Partials& partials) {
        const int64_t flat = blockIdx.x;
        query = static_cast<int32_t>(flat % params.query_len);
        head = static_cast<int32_t>(flat / params.query_len % params.query_heads);
        batch = static_cast<int32_t>(flat / params.query_len / params.query_heads);
        bool clamped;
        const int64_t length =
            bounded_length(__ldg(params.cache.lengths + batch), params.cache.capacity(), &clamped);
        splits = static_cast<int32_t>(num_splits(length));
        sees_keys = length - params.query_len + query >= 0;
        const int group = params.group();
        const int64_t row = head % group * params.query_len + query;
        partial = partials.row(batch * params.kv_heads + head / group, 0, row);
        partial_stride = partials.rows;
    }
};

// One CTA a row.
template <class T, int kDim>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeParams params,
                   const __grid_constant__ Partials partials) {
    using Smem = CombineSmem<kDim>;
    extern __shared__ __align__(128) char smem_bytes[];
    auto& smem = *reinterpret_cast<Smem*>(smem_bytes);
    const CombinedRow row(params, partials);
    const int thread = threadIdx.x;

    float2 weight = {-INFINITY, 0.0f};  // of split `thread`
    if (thread < row.splits) weight = partials.weight[row.partial + thread * row.partial_stride];
    float sink = -INFINITY;  // log2
    if (params.sinks && row.sees_keys) sink = params.sinks[row.head] * device::kLog2E;
    const float reference = reduce_cta(fmaxf(weight.x, sink), smem.shared,
                                       [](float a, float b) { return fmaxf(a, b); });
    const float exponent = device::finite_reference(reference);
    const float factor = ptx::exp2_approx(weight.x - exponent);
    smem.weight[thread] = factor;
    float sum = reduce_cta(factor * weight.y, smem.shared, [](float a, float b) { return a + b; });
    sum += ptx::exp2_approx(sink - exponent);

    const int group = thread / Smem::kQuads, quad = thread % Smem::kQuads;
    const float4* part = reinterpret_cast<const float4*>(partials.out) + quad;
    float4 total = {};
    if (group < Smem::kGroups) {
#pragma unroll 8
        for (int split = group; split < row.splits; split += Smem::kGroups) {
            const float4 x = part[(row.partial + split * row.partial_stride) * Smem::kQuads];
            const float w = smem.weight[split];
            total.x = fmaf(w, x.x, total.x);
            total.y = fmaf(w, x.y, total.y);
            total.z = fmaf(w, x.z, total.z);
            total.w = fmaf(w, x.w, total.w);
        }
        smem.part[group][quad] = total;
    }
    __syncthreads();
    if (thread < Smem::kQuads) {
        float factor_out = sum == 0.0f || !row.sees_keys ? 0.0f : 1.0f / sum;
        if (params.cache.value_scale)
            factor_out *= params.cache.value_scale[row.head / params.group()];
        Vec<T, 4> out;
        const float* parts = reinterpret_cast<const float*>(smem.part);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float x = 0.0f;
#pragma unroll
            for (int g = 0; g < Smem::kGroups; ++g) x += parts[(g * Smem::kQuads + thread) * 4 + e];
            out.elem[e] = from_float<T>(row.sees_keys ? x * factor_out : 0.0f);
        }
        T* out_gmem = static_cast<T*>(params.out) + row.batch * params.out_stride_batch +
                      row.head * params.out_stride_head + row.query * params.out_stride_seq;
        reinterpret_cast<Vec<T, 4>*>(out_gmem)[thread] = out;
    }
    if (thread == 0 && params.lse) {
        constexpr float kLn2 = 0.693147180559945309f;
        const bool empty = sum == 0.0f || !row.sees_keys;
        params.lse[blockIdx.x] = empty ? -INFINITY : (reference + log2f(sum)) * kLn2;
    }
    if (thread == 0 && params.omitted_mass_estimate)
        params.omitted_mass_estimate[blockIdx.x] = 0.0f;
}

}  // namespace condensate::kernels::decode
