// The CTAs that make one shortlist together: one, or a cluster on sm_90 where a sequence is long
// and there are few. What they find is exact, so it does not depend on how many they are.
#pragma once

#include <cstdint>

#include "ptx/cluster.h"

namespace condensate::kernels::decode {

constexpr int kMaxGroupCtas = 8;

struct GroupSums {
    uint32_t before, all;
};

struct Group {
    int size;

    __device__ int index() const { return static_cast<int>(blockIdx.x) / size; }
    __device__ int rank() const { return static_cast<int>(blockIdx.x) % size; }
    // Every thread of the group. What was written before, to shared memory too, is seen after.
    __device__ void sync() const {
        if (size > 1)
            ptx::cluster_sync();
        else
            __syncthreads();
    }
    // What lies at `mine` in the shared memory of CTA r.
    template <class T>
    __device__ T peer(const T& mine, int r) const {
        return size > 1 ? ptx::load_peer(&mine, static_cast<uint32_t>(r)) : mine;
    }
    // Of a number of each CTA, those of lower CTAs and of all; by whole warps.
    __device__ GroupSums sums(const uint32_t& mine) const {
        if (size == 1) return {0, mine};
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const uint32_t x = lane < size ? peer(mine, lane) : 0u;
        return {__reduce_add_sync(0xffffffffu, lane < rank() ? x : 0u),
                __reduce_add_sync(0xffffffffu, x)};
    }
    // Before a CTA ends: the others may still read its shared memory.
    __device__ void end() const {
        if (size > 1) ptx::cluster_sync();
    }
};

}  // namespace condensate::kernels::decode
