// The pipelines that stream chunks of units through shared memory and score them.
#pragma once

#include <cstdint>

#include "kernels/block_select/held_rows.h"
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

// The copy engine and wgmma. Warps meet nowhere but in products, so that some multiply while others
// look at their scores; one of them, in turn, refills the stage that all have released. `streamed`
// counts the chunks so far: the stages are a ring.
template <class Traits, class Load, class Idle, class Body>
__device__ __forceinline__ void score_by_wgmma(typename Traits::Smem& smem,
                                               const HeldRows<Traits>& rows, uint32_t& streamed,
                                               int steps, Load&& load, Idle&& idle, Body&& body) {
    constexpr int kStages = Traits::kStages;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    auto fill = [&](int step) {
        const uint32_t chunk = streamed + step, stage = chunk % kStages;
        ptx::mbarrier_wait(ptx::smem_address(&smem.released[stage]), (chunk / kStages & 1) ^ 1);
        load(step, static_cast<int>(stage));
    };

    if (warp == 0)
        for (int step = 0; step < min(steps, kStages - 1); ++step) fill(step);
    __syncwarp();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const uint32_t chunk = streamed + step, stage = chunk % kStages;
        typename HeldRows<Traits>::Scores s;
        ptx::mbarrier_wait(ptx::smem_address(&smem.landed[stage]), chunk / kStages & 1);
        rows.score_by_wgmma(s, static_cast<int>(stage));
        if ((threadIdx.x & 31) == 0) ptx::mbarrier_arrive(ptx::smem_address(&smem.released[stage]));
        const int next = step + kStages - 1;
        if (warp == step % Traits::kWarps && next < steps) fill(next);
        __syncwarp();
        if (!idle(step)) body(s, step);
    }
    __syncthreads();
    streamed += steps;
}

// Scores `steps` chunks: load(step, stage) starts copying one, and the whole warp or CTA calls it;
// body(scores, step) looks at its scores unless idle(step). All threads of the CTA call it;
// afterwards the stages are free.
template <class Traits, class Load, class Idle, class Body>
__device__ __forceinline__ void score_chunks(typename Traits::Smem& smem,
                                             const HeldRows<Traits>& rows, uint32_t& streamed,
                                             int steps, Load&& load, Idle&& idle, Body&& body) {
    if constexpr (Traits::kWgmma)
        score_by_wgmma(smem, rows, streamed, steps, load, idle, body);
    else
        score_by_mma(rows, steps, load, idle, body);
}

}  // namespace condensate::kernels::block_select
