// Kernels with one fault each, for faults_test.cc.
#include "faults.h"

#include <cuda_runtime.h>

namespace emulate {
namespace {

alignas(128) int smem_bytes[kSharedBytes / 4];
const SharedMemory registered(smem_bytes);

__global__ void shift_kernel(int* data, Fault fault) {
    extern __shared__ int smem_bytes[];
    const unsigned thread = threadIdx.x, next = (thread + 1) % blockDim.x;
    smem_bytes[thread] = data[thread];
    if (fault == Fault::kDivergentBarrier && thread % 2 == 0)
        __syncthreads();
    else if (fault != Fault::kNoBarrier)
        __syncthreads();
    const bool strays = thread == 5;
    const int x = smem_bytes[fault == Fault::kOutOfSharedMemory && strays ? 64 : next];
    data[fault == Fault::kOutOfBounds && strays ? 64 : thread] = x;
    if (fault == Fault::kMissingLane && thread != 7) __syncwarp();
}

}  // namespace

void run_faulty(int* data, Fault fault) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(64);
    config.dynamicSmemBytes = 64 * sizeof(int);
    cudaLaunchKernelEx(&config, shift_kernel, data, fault);
}

}  // namespace emulate
