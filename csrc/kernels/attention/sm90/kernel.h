// Attention over ranges and listed blocks with wgmma: persistent CTAs of a producer and one or two
// consumer warpgroups, K and V by TMA.
#pragma once

#include "kernels/attention/sm90/consume.h"
#include "kernels/attention/sm90/far_rows.h"
#include "kernels/attention/sm90/produce.h"
#include "kernels/attention/sm90/schedule.h"
#include "ptx/registers.h"

namespace condensate::kernels::sm90 {

template <class Traits>
__device__ void init_barriers(typename Traits::Smem& smem) {
    ptx::mbarrier_init(ptx::smem_address(&smem.q_full), 1);
    ptx::mbarrier_init(ptx::smem_address(&smem.q_empty), Traits::kConsumerWarps);
    for (int s = 0; s < Traits::kKeyStages; ++s) {
        ptx::mbarrier_init(ptx::smem_address(&smem.k_full[s]), 1);
        ptx::mbarrier_init(ptx::smem_address(&smem.k_empty[s]), Traits::kConsumerWarps);
    }
    for (int s = 0; s < Traits::kValueStages; ++s) {
        ptx::mbarrier_init(ptx::smem_address(&smem.v_full[s]), 1);
        ptx::mbarrier_init(ptx::smem_address(&smem.v_empty[s]), Traits::kConsumerWarps);
    }
    if constexpr (Traits::kFar) {
        ptx::mbarrier_init(ptx::smem_address(&smem.out_free), Traits::kConsumers);
        ptx::mbarrier_init(ptx::smem_address(&smem.no_far_step), 1);
        for (int s = 0; s < Traits::kFarSteps; ++s) {
            ptx::mbarrier_init(ptx::smem_address(&smem.far_loaded_k[s]), 1);
            ptx::mbarrier_init(ptx::smem_address(&smem.far_loaded_v[s]), 1);
        }
    }
    ptx::fence_mbarrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    attention_sm90_kernel(const __grid_constant__ AttentionParams params,
                          const __grid_constant__ TensorMaps maps,
                          const __grid_constant__ Schedule schedule, uint32_t* error_word) {
    extern __shared__ __align__(1024) char smem_bytes[];
    auto& smem = *reinterpret_cast<typename Traits::Smem*>(smem_bytes);
    if (threadIdx.x == 0) init_barriers<Traits>(smem);
    __syncthreads();

    if (threadIdx.x >= 32 * Traits::kConsumerWarps) {
        ptx::release_registers<Traits::kProducerRegisters>();
        if constexpr (Traits::kFar) {
            if (threadIdx.x >= 32 * (Traits::kConsumerWarps + 1)) {
                FarRows<Traits> rows(smem, params, maps);
                schedule.for_each(params.problem, [&](const Tile& tile) { rows.tile(tile); });
                return;
            }
        }
        if (threadIdx.x != 32 * Traits::kConsumerWarps) return;
        Producer<Traits> producer(smem, params, maps);
        schedule.for_each(params.problem, [&](const Tile& tile) { producer.tile(tile); });
        if (producer.errors) atomicOr(error_word, producer.errors);
    } else {
        ptx::claim_registers<Traits::kConsumerRegisters>();
        Consumer<Traits> consumer(smem, params, maps);
        schedule.for_each(params.problem, [&](const Tile& tile) { consumer.tile(tile); });
        if (threadIdx.x % 128 == 0) ptx::tensor_store_wait_read();  // before the memory goes away
    }
}

}  // namespace condensate::kernels::sm90
