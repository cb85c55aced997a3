// The CTAs that make one shortlist together: one, or a cluster on sm_90 where a sequence is long
// and there are few. What they find is exact, so it does not depend on how many they are.
#pragma once

#include <cstdint>

#include "ptx/cluster.h"

namespace condensate::kernels::decode {

constexpr int kMaxGroupCtas = 8;

struct Group {
    int size;

    __device__ int index() const { return static_cast<int>(blockIdx.x) / size; }
    __device__ int rank() const { return static_cast<int>(blockIdx.x) % size; }
    // Every thread of the group. What was written before is seen after by loads past L1.
    __device__ void sync() const {
        if (size > 1)
            ptx::cluster_sync();
        else
            __syncthreads();
    }
};

}  // namespace condensate::kernels::decode
