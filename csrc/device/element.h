// Element types of tensors: conversion to and from float32, wide accesses, dispatch on DType.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "condensate/types.h"

namespace condensate::kernels {

template <class T>
struct TypeTag {
    using type = T;
};

// Calls body(TypeTag<T>{}) with the element type of `dtype`.
template <class Body>
auto with_element_type(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kFloat16:
            return body(TypeTag<__half>{});
        case DType::kBFloat16:
            return body(TypeTag<__nv_bfloat16>{});
        case DType::kFloat32:
        case DType::kFloat8E4M3:  // of caches alone: never here
            break;
    }
    return body(TypeTag<float>{});
}

inline int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// kElems consecutive elements that move as one access.
template <class T, int kElems>
struct alignas(kElems * sizeof(T)) Vec {
    T elem[kElems];
};

constexpr int kWideBytes = 16;  // widest access of one thread

// Do all rows of the tensor start at a multiple of kWideBytes? Extents of 1 have no stride.
inline bool is_wide_aligned(const ConstTensor4& tensor, DType dtype, int64_t batch, int64_t heads,
                            int64_t seq) {
    int64_t bytes = element_bytes(dtype);
    auto multiple = [bytes](int64_t extent, int64_t stride) {
        return extent <= 1 || stride * bytes % kWideBytes == 0;
    };
    return reinterpret_cast<uintptr_t>(tensor.data) % kWideBytes == 0 &&
           multiple(batch, tensor.stride_batch) && multiple(heads, tensor.stride_head) &&
           multiple(seq, tensor.stride_seq);
}
inline bool is_wide_aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kWideBytes == 0;
}

}  // namespace condensate::kernels
