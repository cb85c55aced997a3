// The CTAs that work on one query of one KV head: always kGroupCtas of them, each with a fixed
// share of the work, so that sums do not depend on what else runs. On sm_90 a group is a cluster;
// elsewhere the CTAs of a cooperative launch meet at a counter.
#pragma once

#include <cstdint>

#include "ptx/cluster.h"

namespace condensate::kernels::decode {

constexpr int kGroupCtas = 16;

class Group {
  public:
    // `counter`: zero when the kernel starts; null for a cluster.
    __device__ explicit Group(uint32_t* counter) : counter_(counter) {}

    __device__ static int index() { return static_cast<int>(blockIdx.x) / kGroupCtas; }
    __device__ static int count() { return static_cast<int>(gridDim.x) / kGroupCtas; }
    __device__ static int rank() { return static_cast<int>(blockIdx.x) % kGroupCtas; }

    // Every thread of the group. What was written before is seen after by loads past L1.
    __device__ void sync() {
        if (counter_ == nullptr) {
            ptx::cluster_sync();
            return;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            target_ += kGroupCtas;
            __threadfence();
            atomicAdd(counter_, 1u);
            while (ptx::load_acquire(counter_) < target_) {
            }
            __threadfence();
        }
        __syncthreads();
    }

  private:
    uint32_t* counter_;
    uint32_t target_ = 0;
};

}  // namespace condensate::kernels::decode
