// Dense decoding by type T of the queries, of caches of T and of 8-bit ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "condensate/decode.h"
#include "kernels/launchers.h"

namespace condensate::kernels::decode {

template <class T>
Status decode_dense_16bit(const DecodeParams& params, const LaunchContext& context);
template <class T>
Status decode_dense_float8(const DecodeParams& params, const LaunchContext& context);

}  // namespace condensate::kernels::decode
