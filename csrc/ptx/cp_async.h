// Asynchronous 16-byte copies from global to shared memory (sm_80).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-non-bulk-copy
#pragma once

#include <cstdint>

namespace condensate::ptx {

// Copies 16 bytes past L1, or writes 16 zero bytes when `copy` is false (the source is then not
// read).
__device__ __forceinline__ void cp_async_16(uint32_t dst_smem, const void* src_gmem, bool copy) {
    int src_bytes = copy ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst_smem),
                 "l"(src_gmem), "r"(src_bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace condensate::ptx
