// Adds up the splits of a row in ascending order and writes its output and LSE.
#include <cmath>

#include "condensate/decode.h"
#include "device/element.h"
#include "device/softmax.h"
#include "kernels/decode/dense/stages.h"
#include "kernels/launch.h"
#include "ptx/grid.h"

namespace condensate::kernels::decode {
namespace {

constexpr int kCombineThreads = 256;
constexpr int kCombineBatch = 8;  // partial outputs that a thread loads at once

template <int kDim>
struct CombineSmem {
    static constexpr int kQuads = kDim / 4;                   // threads that share a row
    static constexpr int kGroups = kCombineThreads / kQuads;  // every kGroups-th split each
    float weight[kCombineThreads];
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
        splits = static_cast<int32_t>(Splits(params.kv_heads).count(length));
        sees_keys = length - params.query_len + query >= 0;
        const int group = params.group();
        const int64_t row = head % group * params.query_len + query;
        partial = partials.row(batch * params.kv_heads + head / group, 0, row);
        partial_stride = partials.rows;
    }
};

// Partial outputs of a thread's splits, kGroups apart, from `first` on; zero behind the last.
template <int kDim>
__device__ __forceinline__ void load_parts(float4 (&parts)[kCombineBatch], const Partials& partials,
                                           const CombinedRow& row, int first, int quad) {
    using Smem = CombineSmem<kDim>;
#pragma unroll
    for (int j = 0; j < kCombineBatch; ++j) {
        const int split = first + j * Smem::kGroups;
        const int64_t flat = row.partial + split * row.partial_stride;
        parts[j] = split < row.splits
                       ? reinterpret_cast<const float4*>(partials.out)[flat * Smem::kQuads + quad]
                       : float4{};
    }
}

// Writes a row's four channels of this thread: the groups' sums, added up.
template <class T, int kDim>
__device__ __forceinline__ void store_combined(const CombineSmem<kDim>& smem,
                                               const DecodeParams& params, const CombinedRow& row,
                                               float factor) {
    constexpr int kGroups = CombineSmem<kDim>::kGroups;
    float4 total = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        const float4 x = smem.part[g][threadIdx.x];
        total.x += x.x;
        total.y += x.y;
        total.z += x.z;
        total.w += x.w;
    }
    Vec<T, 4> out = {};  // a row that sees no key does not see NaN among the values either
    if (row.sees_keys)
        out = {{from_float<T>(total.x * factor), from_float<T>(total.y * factor),
                from_float<T>(total.z * factor), from_float<T>(total.w * factor)}};
    T* out_gmem = static_cast<T*>(params.out) + row.batch * params.out_stride_batch +
                  row.head * params.out_stride_head + row.query * params.out_stride_seq;
    reinterpret_cast<Vec<T, 4>*>(out_gmem)[threadIdx.x] = out;
}

// One CTA a row.
template <class T, int kDim>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeParams params,
                   const __grid_constant__ Partials partials) {
    using Smem = CombineSmem<kDim>;
    extern __shared__ __align__(128) char smem_bytes[];
    auto& smem = *reinterpret_cast<Smem*>(smem_bytes);
    const CombinedRow row(params, partials);
    const int thread = threadIdx.x, group = thread / Smem::kQuads, quad = thread % Smem::kQuads;
    float sink = -INFINITY;  // log2
    if (params.sinks && row.sees_keys) sink = params.sinks[row.head] * device::kLog2E;
    ptx::wait_for_prior_grids();

    float2 weight = {-INFINITY, 0.0f};  // of split `thread`
    if (thread < row.splits) weight = partials.weight[row.partial + thread * row.partial_stride];
    float4 parts[kCombineBatch];
    load_parts<kDim>(parts, partials, row, group < Smem::kGroups ? group : row.splits, quad);
    const float reference = reduce_cta(fmaxf(weight.x, sink), smem.shared,
                                       [](float a, float b) { return fmaxf(a, b); });
    const float exponent = device::finite_reference(reference);
    const float factor = ptx::exp2_approx(weight.x - exponent);
    smem.weight[thread] = factor;
    float sum = reduce_cta(factor * weight.y, smem.shared, [](float a, float b) { return a + b; });
    sum += ptx::exp2_approx(sink - exponent);

    if (group < Smem::kGroups) {
        float4 total = {};
        for (int first = group; first < row.splits; first += kCombineBatch * Smem::kGroups) {
            if (first != group) load_parts<kDim>(parts, partials, row, first, quad);
#pragma unroll
            for (int j = 0; j < kCombineBatch; ++j) {
                const int split = first + j * Smem::kGroups;
                const float w = split < row.splits ? smem.weight[split] : 0.0f;
                total.x = fmaf(w, parts[j].x, total.x);
                total.y = fmaf(w, parts[j].y, total.y);
                total.z = fmaf(w, parts[j].z, total.z);
                total.w = fmaf(w, parts[j].w, total.w);
            }
        }
        smem.part[group][quad] = total;
    }
    __syncthreads();  // the groups' sums are there
    if (thread < Smem::kQuads) {
        float out_factor = sum == 0.0f || !row.sees_keys ? 0.0f : 1.0f / sum;
        if (params.cache.value_scale)
            out_factor *= params.cache.value_scale[row.head / params.group()];
        store_combined<T, kDim>(smem, params, row, out_factor);
    }
    if (thread == 0 && params.lse) {
        constexpr float kLn2 = 0.693147180559945309f;
        const bool empty = sum == 0.0f || !row.sees_keys;
        params.lse[blockIdx.x] = empty ? -INFINITY : (reference + log2f(sum)) * kLn2;
    }
    if (thread == 0 && params.omitted_mass_estimate)
        params.omitted_mass_estimate[blockIdx.x] = 0.0f;
}

template <class T, int kDim>
Status run_combine(const DecodeParams& params, const Partials& partials,
                   const LaunchContext& context) {
    Grid rows = {params.batch * params.query_heads * params.query_len};
    rows.overlaps = true;
    return launch(combine_kernel<T, kDim>, "decode_dense_combine", rows, kCombineThreads,
                  sizeof(CombineSmem<kDim>), context, params, partials);
}

template <class T>
Status choose_dim(const DecodeParams& params, const Partials& partials,
                  const LaunchContext& context) {
    switch (params.head_dim) {
        case 64:
            return run_combine<T, 64>(params, partials, context);
        case 96:
            return run_combine<T, 96>(params, partials, context);
        case 128:
            return run_combine<T, 128>(params, partials, context);
    }
    return run_combine<T, 256>(params, partials, context);
}

}  // namespace

Status combine_splits(const DecodeParams& params, const Partials& partials,
                      const LaunchContext& context) {
    return params.dtype == DType::kFloat16 ? choose_dim<__half>(params, partials, context)
                                           : choose_dim<__nv_bfloat16>(params, partials, context);
}

}  // namespace condensate::kernels::decode
