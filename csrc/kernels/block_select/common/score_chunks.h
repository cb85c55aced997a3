// The pipelines that stream chunks of units through shared memory and score them.
#pragma once

#include <cstdint>

#include "kernels/block_select/common/held_rows.h"
#include "ptx/barrier.h"

namespace condensate::kernels::block_select {

// Readies the barriers of the stages; a __syncthreads must follow.
template <class Traits>
__device__ __forceinline__ void init_stages(typename Traits::Smem& smem) {
    if constexpr (Traits::kWgmma) {
        if (threadIdx.x == 0) {
            for (int s = 0; s < Traits::kStages; ++s) {
                ptx::mbarrier_init(ptx::smem_address(&smem.landed[s]), 1);
                ptx::mbarrier_init(ptx::smem_address(&smem.released[s]), Traits::kWarps);
            }
            ptx::fence_mbarrier_init();
        }
    }
}

// cp.async and mma.sync: one barrier a step, before its chunk is scored.
template <class Traits, class Load, class Idle, class Body>
__device__ __forceinline__ void score_by_mma(const HeldRows<Traits>& rows, int steps, Load&& load,
                                             Idle&& idle, Body&& body) {
    constexpr int kStages = Traits::kStages;
    auto start = [&](int step) {
        if (step < steps) load(step, step % kStages);
        ptx::cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) start(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this chunk has landed; nobody reads the one before it any more
        start(step + kStages - 1);
        if (idle(step)) continue;
        typename HeldRows<Traits>::Scores s;
        rows.score(s, step % kStages);
        body(s, step);
    }
    __syncthreads();
}

// TMA and wgmma. Warps meet nowhere but in products, so that some multiply while others
// look at their scores. A chunk is copied in kBoxes boxes, which the warps start in turn, into a
// stage that all have released: no warp may be much later than its warpgroup. `streamed` counts the
// chunks so far: the stages are a ring.
template <class Traits, int kBoxes, class Load, class Idle, class Body>
__device__ __forceinline__ void score_by_wgmma(typename Traits::Smem& smem,
                                               const HeldRows<Traits>& rows, uint32_t& streamed,
                                               int steps, Load&& load, Idle&& idle, Body&& body) {
    constexpr int kStages = Traits::kStages;
    static_assert((Traits::kWarps & (Traits::kWarps - 1)) == 0, "boxes are dealt by masking");
    auto fill = [&](int step) {
        const uint32_t chunk = streamed + step, stage = chunk % kStages;
        const uint32_t box = (threadIdx.x / 32 - chunk * kBoxes) & (Traits::kWarps - 1);
        if (step >= steps || box >= kBoxes) return;
        ptx::mbarrier_wait(ptx::smem_address(&smem.released[stage]), (chunk / kStages & 1) ^ 1);
        const uint32_t landed = ptx::smem_address(&smem.landed[stage]);
        if (box == 0 && (threadIdx.x & 31) == 0)
            ptx::mbarrier_arrive_expect(landed, Traits::kPanels * Traits::kPanelBytes);
        load(step, ptx::smem_address(smem.stages[stage]), landed, static_cast<int>(box));
    };

    for (int step = 0; step < kStages - 1; ++step) fill(step);
    __syncwarp();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const uint32_t chunk = streamed + step, stage = chunk % kStages;
        typename HeldRows<Traits>::Scores s;
        ptx::mbarrier_wait(ptx::smem_address(&smem.landed[stage]), chunk / kStages & 1);
        rows.score_by_wgmma(s, static_cast<int>(stage));
        if ((threadIdx.x & 31) == 0) ptx::mbarrier_arrive(ptx::smem_address(&smem.released[stage]));
        fill(step + kStages - 1);
        __syncwarp();
        if (!idle(step)) body(s, step);
    }
    __syncthreads();
    streamed += steps;
}

// Scores `steps` chunks: body(scores, step) looks at a chunk's scores unless idle(step). What
// starts copying one is load(step, stage), which all threads call; of boxes load(step, stage_smem,
// landed_smem, box), which a warp calls for that one and every kWarps-th after it, steps ascending.
// All threads of the CTA call it; afterwards the stages are free.
template <class Traits, int kBoxes, class Load, class Idle, class Body>
__device__ __forceinline__ void score_chunks(typename Traits::Smem& smem,
                                             const HeldRows<Traits>& rows, uint32_t& streamed,
                                             int steps, Load&& load, Idle&& idle, Body&& body) {
    if constexpr (Traits::kWgmma)
        score_by_wgmma<Traits, kBoxes>(smem, rows, streamed, steps, load, idle, body);
    else
        score_by_mma(rows, steps, load, idle, body);
}

}  // namespace condensate::kernels::block_select
