// Dense decoding over one type of cache: chooses the instantiation.
#pragma once

#include "kernels/decode/dense/kernel.h"
#include "kernels/decode/dense/stages.h"
#include "kernels/launch.h"

namespace condensate::kernels::decode {

template <class Traits>
Status run_splits(const DecodeParams& params, const Partials& partials,
                  const LaunchContext& context) {
    const int row_tiles = static_cast<int>(ceil_div(partials.rows, Traits::kRows));
    const int64_t items = params.batch * params.kv_heads * row_tiles * partials.max_splits;
    const Grid grid = {min_i64(items, int64_t{context.sm_count} * Traits::kCtasPerSm)};
    return launch(decode_dense_kernel<Traits>, "decode_dense", grid, Traits::kThreads,
                  sizeof(typename Traits::Smem), context, params, partials, row_tiles,
                  context.error_word);
}

template <class Element, int kDim>
Status choose_rows(const DecodeParams& params, const Partials& partials,
                   const LaunchContext& context) {
    if constexpr (kDim <= 128) {  // 32 rows of 256 channels do not fit a warp's registers
        if (partials.rows > 16)
            return run_splits<DenseTraits<Element, kDim, 2>>(params, partials, context);
    }
    return run_splits<DenseTraits<Element, kDim, 1>>(params, partials, context);
}

template <class Element>
Status attend_splits(const DecodeParams& params, const Partials& partials,
                     const LaunchContext& context) {
    switch (params.head_dim) {
        case 64:
            return choose_rows<Element, 64>(params, partials, context);
        case 96:
            return choose_rows<Element, 96>(params, partials, context);
        case 128:
            return choose_rows<Element, 128>(params, partials, context);
        case 256:
            return choose_rows<Element, 256>(params, partials, context);
    }
    return unsupported("decode_dense", "head_dim", params.head_dim, 256);
}

}  // namespace condensate::kernels::decode
