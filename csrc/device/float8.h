// e4m3 elements of 8-bit caches: exact conversion to 16 bits and float32.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "device/pack.h"

namespace condensate::device {

using Float8 = __nv_fp8_e4m3;

// The two elements in the low 16 bits of `pair` as packed elements of T.
template <class T>
__device__ __forceinline__ uint32_t unpack_float8(uint32_t pair) {
    const __half2_raw halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
    if constexpr (std::is_same_v<T, __half>) return *reinterpret_cast<const uint32_t*>(&halves);
    const float2 floats = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    return pack2<T>(floats.x, floats.y);
}

}  // namespace condensate::device
