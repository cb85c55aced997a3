// Barriers of a thread block cluster (sm_90).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
#pragma once

#include <cstdint>

namespace condensate::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// All threads of all CTAs of the cluster. Writes before it, to global memory too, are seen after it
// by reads that do not come from L1.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;\n" ::
            : "memory");
#endif
}

// What lies at `mine` of this CTA's shared memory, in that of the cluster's CTA `rank`. That CTA
// has to have started, and not to have ended: a cluster_sync() before and one after.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-mapa
__device__ __forceinline__ uint32_t peer_address(const void* mine, uint32_t rank) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;\n" : "+r"(address) : "r"(rank));
#endif
    return address;
}
__device__ __forceinline__ uint32_t load_peer(const uint32_t* mine, uint32_t rank) {
    uint32_t x = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.u32 %0, [%1];\n"
                 : "=r"(x)
                 : "r"(peer_address(mine, rank))
                 : "memory");
#endif
    return x;
}
__device__ __forceinline__ unsigned long long load_peer(const unsigned long long* mine,
                                                        uint32_t rank) {
    unsigned long long x = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.u64 %0, [%1];\n"
                 : "=l"(x)
                 : "r"(peer_address(mine, rank))
                 : "memory");
#endif
    return x;
}

// A load that waits for what the release of another CTA of this GPU made visible.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(address) : "memory");
    return value;
}

}  // namespace condensate::ptx
