// Descriptors by which TMA reads and writes boxes of four-dimensional tensors.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>

#include "condensate/params.h"

namespace condensate::kernels {

// A [batch, heads, length, head_dim] tensor of 16-bit elements seen in boxes of [heads, positions,
// 64 channels], or anything else with such strides; a box's rows of 128 bytes lie in shared memory
// one after the other, their 16-byte chunks swizzled (see smem_tile.h).
struct TensorBoxes {
    ConstTensor4 tensor;
    int64_t batch, heads, length, head_dim;
    DType dtype;
    int box_heads;
    int box_positions;
};

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time so that nothing links against libcuda.
inline EncodeTiled find_encoder() {
    static const EncodeTiled encoder = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
        bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
        return usable ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
    }();
    return encoder;
}

inline Status make_tensor_map(const TensorBoxes& boxes, CUtensorMap* map) {
    constexpr int64_t kElementBytes = 2;
    Status status;
    EncodeTiled encode = find_encoder();
    CUresult result = CUDA_ERROR_NOT_SUPPORTED;
    if (encode != nullptr) {
        const ConstTensor4& t = boxes.tensor;
        // The stride of an extent of 1 means nothing and may be anything, but must look valid.
        auto stride = [&](int64_t elements, int64_t extent) {
            return static_cast<cuuint64_t>((extent > 1 ? elements : boxes.head_dim) *
                                           kElementBytes);
        };
        const cuuint64_t extents[4] = {
            static_cast<cuuint64_t>(boxes.head_dim), static_cast<cuuint64_t>(boxes.length),
            static_cast<cuuint64_t>(boxes.heads), static_cast<cuuint64_t>(boxes.batch)};
        const cuuint64_t strides[3] = {stride(t.stride_seq, boxes.length),
                                       stride(t.stride_head, boxes.heads),
                                       stride(t.stride_batch, boxes.batch)};
        const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(boxes.box_positions),
                                   static_cast<cuuint32_t>(boxes.box_heads), 1};
        const cuuint32_t steps[4] = {1, 1, 1, 1};
        result = encode(map,
                        boxes.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                        4, const_cast<void*>(t.data), extents, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    }
    if (result == CUDA_SUCCESS) return status;
    status.code = StatusCode::kCudaError;
    std::snprintf(status.message, sizeof(status.message),
                  "cuTensorMapEncodeTiled: %s (CUresult %d)",
                  encode == nullptr ? "not offered by this driver" : "tensor refused",
                  static_cast<int>(result));
    return status;
}

}  // namespace condensate::kernels
