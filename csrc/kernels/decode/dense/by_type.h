// Dense decoding for one type of queries: chooses the instantiation and starts both kernels.
#pragma once

#include "device/element.h"
#include "kernels/decode/dense/combine.h"
#include "kernels/decode/dense/kernel.h"
#include "kernels/launch.h"

namespace condensate::kernels::decode {

inline Partials partials_of(const DecodeParams& params) {
    Partials partials = {};
    partials.max_splits = static_cast<int32_t>(max_splits(params.cache.capacity()));
    partials.rows = static_cast<int32_t>(params.group() * params.query_len);
    partials.out = static_cast<float*>(params.workspace);
    partials.weight =
        reinterpret_cast<float2*>(partials.out + partial_rows(params) * params.head_dim);
    return partials;
}

template <class Traits>
Status run_dense(const DecodeParams& params, const LaunchContext& context) {
    const Partials partials = partials_of(params);
    const int row_tiles = static_cast<int>(ceil_div(partials.rows, Traits::kRows));
    const int64_t items = params.batch * params.kv_heads * row_tiles * partials.max_splits;
    const Grid grid = {min_i64(items, int64_t{context.sm_count} * Traits::kCtasPerSm)};
    Status status = launch(decode_dense_kernel<Traits>, "decode_dense", grid, Traits::kThreads,
                           sizeof(typename Traits::Smem), context, params, partials, row_tiles,
                           context.error_word);
    if (!status.ok()) return status;
    Grid rows = {params.batch * params.query_heads * params.query_len};
    rows.overlaps = true;
    return launch(combine_kernel<typename Traits::T, Traits::kDim>, "decode_dense_combine", rows,
                  kCombineThreads, sizeof(CombineSmem<Traits::kDim>), context, params, partials);
}

template <class T, class Element, int kDim>
Status choose_rows(const DecodeParams& params, const LaunchContext& context) {
    if constexpr (kDim <= 128) {  // 32 rows of 256 channels do not fit a warp's registers
        if (params.group() * params.query_len > 16)
            return run_dense<DenseTraits<T, Element, kDim, 2>>(params, context);
    }
    return run_dense<DenseTraits<T, Element, kDim, 1>>(params, context);
}

template <class T, class Element>
Status choose_dim(const DecodeParams& params, const LaunchContext& context) {
    switch (params.head_dim) {
        case 64:
            return choose_rows<T, Element, 64>(params, context);
        case 96:
            return choose_rows<T, Element, 96>(params, context);
        case 128:
            return choose_rows<T, Element, 128>(params, context);
        case 256:
            return choose_rows<T, Element, 256>(params, context);
    }
    return unsupported("decode_dense", "head_dim", params.head_dim, 256);
}

template <class T>
Status decode_dense_16bit(const DecodeParams& params, const LaunchContext& context) {
    return choose_dim<T, T>(params, context);
}
template <class T>
Status decode_dense_float8(const DecodeParams& params, const LaunchContext& context) {
    return choose_dim<T, device::Float8>(params, context);
}

}  // namespace condensate::kernels::decode
