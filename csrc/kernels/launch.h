// The one way a kernel is started: checks limits, raises the shared memory limit, returns a Status.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

#include "condensate/types.h"
#include "kernels/launchers.h"

namespace condensate::kernels {

// Grid extents in 64 bits, so that an extent too large for the hardware is reported, not wrapped.
struct Grid {
    int64_t x;
    int64_t y = 1;
    int64_t z = 1;
    int cluster = 1;           // CTAs of a cluster along x
    bool cooperative = false;  // all CTAs are resident at once, or the launch fails
    // May start while the kernel before it runs, and waits for it (ptx/grid.h); from sm_90 on.
    bool overlaps = false;
};

inline Status cuda_status(cudaError_t error, const char* kernel_name) {
    Status status;
    if (error == cudaSuccess) return status;
    status.code = StatusCode::kCudaError;
    std::snprintf(status.message, sizeof(status.message), "CUDA kernel %s: %s (%s)", kernel_name,
                  cudaGetErrorString(error), cudaGetErrorName(error));
    return status;
}

inline Status unsupported(const char* kernel_name, const char* what, int64_t value,
                          int64_t allowed) {
    Status status;
    status.code = StatusCode::kUnsupported;
    std::snprintf(status.message, sizeof(status.message),
                  "CUDA kernel %s needs %s = %lld; this device allows at most %lld", kernel_name,
                  what, static_cast<long long>(value), static_cast<long long>(allowed));
    return status;
}

constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kDefaultSmemBytes = 48 * 1024;  // above it a kernel must opt in

// Lets a kernel have `smem_bytes` of dynamic shared memory.
template <class... KernelArgs>
Status allow_shared_memory(void (*kernel)(KernelArgs...), const char* name, int64_t smem_bytes,
                           const LaunchContext& context) {
    if (smem_bytes > context.max_smem_per_block_bytes) {
        return unsupported(name, "shared memory bytes per block", smem_bytes,
                           context.max_smem_per_block_bytes);
    }
    if (smem_bytes <= kDefaultSmemBytes) return {};
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(smem_bytes));
    if (error != cudaSuccess) cudaGetLastError();  // reported here, not left for the next caller
    return cuda_status(error, name);
}

// Starts `kernel` on context.stream. A grid without blocks is a success that starts nothing.
// `smem_bytes` is dynamic shared memory; kernels of this library declare no static shared memory.
template <class... KernelArgs, class... Args>
Status launch(void (*kernel)(KernelArgs...), const char* name, Grid grid, int threads,
              int64_t smem_bytes, const LaunchContext& context, const Args&... args) {
    static_assert(sizeof...(KernelArgs) == sizeof...(Args),
                  "launch: pass exactly the arguments that the kernel takes");
    if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return {};
    if (grid.x > kMaxGridX) return unsupported(name, "grid.x", grid.x, kMaxGridX);
    if (grid.y > kMaxGridYZ) return unsupported(name, "grid.y", grid.y, kMaxGridYZ);
    if (grid.z > kMaxGridYZ) return unsupported(name, "grid.z", grid.z, kMaxGridYZ);
    Status status = allow_shared_memory(kernel, name, smem_bytes, context);
    if (!status.ok()) return status;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                          static_cast<unsigned>(grid.z));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
    config.stream = context.stream;
    cudaLaunchAttribute attributes[3] = {};
    config.attrs = attributes;
    if (grid.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
        ++config.numAttrs;
    }
    if (grid.cooperative) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs].val.cooperative = 1;
        ++config.numAttrs;
    }
    if (grid.overlaps && context.sm_major >= 9) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        ++config.numAttrs;
    }
    cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
    if (error != cudaSuccess) cudaGetLastError();
    return cuda_status(error, name);
}

}  // namespace condensate::kernels
