// Copies of boxes of a tensor between global and shared memory by TMA (sm_90).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once

#include <cstdint>

namespace condensate::ptx {

// `map` is a CUtensorMap in parameter or constant memory.
__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Loads the box at (c0, c1, c2, c3), innermost first; what lies outside the tensor becomes zero.
// The bytes of the whole box count towards `barrier_smem`.
__device__ __forceinline__ void tensor_load_4d(uint32_t dst_smem, const void* map,
                                               uint32_t barrier_smem, int c0, int c1, int c2,
                                               int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(dst_smem),
        "l"(map), "r"(barrier_smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Stores a box; what lies outside the tensor is not written.
__device__ __forceinline__ void tensor_store_4d(const void* map, uint32_t src_smem, int c0, int c1,
                                                int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::
            "l"(map),
        "r"(src_smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
__device__ __forceinline__ void tensor_store_commit() {
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// Waits until this thread's stores have read their shared memory.
__device__ __forceinline__ void tensor_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}

}  // namespace condensate::ptx
