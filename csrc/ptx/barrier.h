// Memory barriers in shared memory that count arrivals and bytes (sm_90), named barriers of warps,
// and the fence between ordinary and asynchronous accesses.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
#pragma once

#include <cstdint>

namespace condensate::ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier_smem, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier_smem), "r"(arrivals)
                 : "memory");
}
// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier_smem) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier_smem) : "memory");
}
// Arrives, and makes the phase wait for `bytes` of asynchronous copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier_smem, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier_smem),
                 "r"(bytes)
                 : "memory");
}
// Waits for the phase of this parity to complete; a fresh barrier's phase before the first has
// parity 1 and is complete.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier_smem, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra wait;\n"
        "finished:\n"
        "}\n" ::"r"(barrier_smem),
        "r"(parity)
        : "memory");
}

// The same, asking only every so often, so that others have the memory instructions' pipe.
__device__ __forceinline__ void mbarrier_wait_patiently(uint32_t barrier_smem, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "nanosleep.u32 200;\n"
        "bra wait;\n"
        "finished:\n"
        "}\n" ::"r"(barrier_smem),
        "r"(parity)
        : "memory");
}

// Barrier `id` (0 is __syncthreads) of `threads` threads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
// Counts this thread in and does not wait.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones of TMA and
// the tensor cores.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

}  // namespace condensate::ptx
