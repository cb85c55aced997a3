// e4m3 elements of 8-bit caches.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace condensate::device {

using Float8 = __nv_fp8_e4m3;

// The two elements in the low 16 bits of `pair` as packed float16, exactly.
__device__ __forceinline__ uint32_t unpack_float8(uint32_t pair) {
    const __half2_raw halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
    return *reinterpret_cast<const uint32_t*>(&halves);
}

}  // namespace condensate::device
