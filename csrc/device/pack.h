// Conversions and elementwise steps on register tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace condensate::device {

// Two floats rounded to nearest even, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
    __half2 packed = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&packed);
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&packed);
}

// The floats of two packed elements, x from the low half.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t pair) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// Multiplies rows lane/4 (half 0) and lane/4 + 8 (half 1) of each 16-row tile.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void scale_rows(float (&tile)[kMTiles][kNTiles][4],
                                           const float (&factor)[kMTiles][2]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) tile[m][n][e] *= factor[m][e / 2];
}

// Flips finite and infinite signs but keeps -inf, the mark of a dropped key.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void negate(float (&tile)[kMTiles][kNTiles][4]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (tile[m][n][e] != -INFINITY) tile[m][n][e] = -tile[m][n][e];
}

}  // namespace condensate::device
