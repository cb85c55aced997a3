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

// As loaded: 16 bytes of a 16-bit type, 8 of e4m3.
template <class CacheT>
struct Loaded8 {
    uint4 x;
};
template <>
struct Loaded8<__nv_fp8_e4m3> {
    uint2 x;
};
template <class CacheT>
__device__ __forceinline__ Loaded8<CacheT> load_8(const CacheT* row) {
    return {__ldg(reinterpret_cast<const decltype(Loaded8<CacheT>::x)*>(row))};
}

// In the type that the products take; e4m3 fits both 16-bit types.
template <class T>
__device__ __forceinline__ uint4 elements_of(const Loaded8<T>& loaded) {
    return loaded.x;
}
template <class T>
__device__ __forceinline__ uint4 elements_of(const Loaded8<__nv_fp8_e4m3>& loaded) {
    const uint32_t words[2] = {loaded.x.x, loaded.x.y};
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const auto two = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
        const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
        pairs[i] = pair_of(__half2(raw), T{});
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

}  // namespace condensate::kernels::decode
