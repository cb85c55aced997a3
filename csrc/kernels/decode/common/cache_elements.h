// Eight consecutive elements of a cache, in the type that the products take.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace condensate::kernels::decode {

__device__ __forceinline__ uint32_t pair_of(__half2 x, __half) {
    return *reinterpret_cast<uint32_t*>(&x);
}
__device__ __forceinline__ uint32_t pair_of(__half2 x, __nv_bfloat16) {
    const float2 f = __half22float2(x);
    __nv_bfloat162 y = __floats2bfloat162_rn(f.x, f.y);
    return *reinterpret_cast<uint32_t*>(&y);
}

template <class T>
__device__ __forceinline__ uint4 load_8(const T* row) {
    return __ldg(reinterpret_cast<const uint4*>(row));
}
// e4m3 fits both 16-bit types.
template <class T>
__device__ __forceinline__ uint4 load_8(const __nv_fp8_e4m3* row) {
    const uint2 bytes = __ldg(reinterpret_cast<const uint2*>(row));
    const uint32_t words[2] = {bytes.x, bytes.y};
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const auto two = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
        const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
        pairs[i] = pair_of(__half2(raw), T{});
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ float2 floats_of(uint32_t pair, __half) {
    return __half22float2(*reinterpret_cast<__half2*>(&pair));
}
__device__ __forceinline__ float2 floats_of(uint32_t pair, __nv_bfloat16) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
}

}  // namespace condensate::kernels::decode
