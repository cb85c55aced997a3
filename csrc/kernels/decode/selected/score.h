// Exact scores of the keys in this CTA's slots, from memory straight into registers.
#pragma once

#include "device/element.h"
#include "kernels/decode/common/cache_elements.h"
#include "kernels/decode/common/cache_view.h"
#include "kernels/decode/selected/scan.h"
#include "ptx/matrix.h"

namespace condensate::kernels::decode {

// Scores slots [0, count): key_scores in log2, -inf where a slot has no key. 16 slots a warp: the
// lane's 8 channels of every 32 of keys lane / 4 and lane / 4 + 8.
template <class T, int kDim, int kHeadTiles, class CacheT>
__device__ __noinline__ void score_slots(const SmemArrays& smem, const CacheView<CacheT>& cache,
                                         const DecodeParams& params, int64_t kv_head,
                                         Exchange& exchange, int rank, int count,
                                         uint32_t* error_word) {
    constexpr int kSteps = kDim / 32;
    const float score_scale =
        params.scale * (params.cache.key_scale ? params.cache.key_scale[kv_head] : 1.0f);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int group = params.group(), t = lane % 4;
    constexpr bool kHeld = kDim * kHeadTiles <= 256;  // queries stay in registers
    uint4 query[kHeld ? kHeadTiles : 1][kHeld ? kSteps : 1];
    const T* query_lane = static_cast<const T*>(smem.query) + lane / 4 * kDim + 8 * t;
    const auto query_step = [&](int n, int s) {
        return *reinterpret_cast<const uint4*>(query_lane + 8 * n * kDim + 32 * s);
    };
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
        if constexpr (kHeld) {
#pragma unroll
            for (int s = 0; s < kSteps; ++s) query[n][s] = query_step(n, s);
        }
    }
    for (int first = 16 * warp; first < count; first += 16 * kWarps) {
        uint4 keys[2][kSteps];
        int32_t token[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int slot = first + lane / 4 + 8 * half;
            token[half] = slot < count ? smem.slot_key[slot] : -1;
        }
        __syncwarp();  // before a lane takes a key out
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int slot = first + lane / 4 + 8 * half;
            const int32_t page = token[half] >= 0 ? cache.page_of(token[half]) : -1;
            if (token[half] >= 0 && page < 0) {  // the page is not there, nor is its key
                if (t == 0) {
                    atomicOr(error_word, kErrorBlockTable);
                    smem.slot_key[slot] = -1;
                }
                token[half] = -1;
            }
            const CacheT* row = page >= 0 ? cache.key_row(page, token[half]) : nullptr;
#pragma unroll
            for (int s = 0; s < kSteps; ++s)
                keys[half][s] = row ? load_8<T>(row + 32 * s + 8 * t) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int n = 0; n < kHeadTiles; ++n) {
            float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                const uint4 &lo = keys[0][s], &hi = keys[1][s];
                uint4 q;
                if constexpr (kHeld)
                    q = query[n][s];
                else
                    q = query_step(n, s);
                const uint32_t even[4] = {lo.x, hi.x, lo.y, hi.y};
                ptx::mma_m16n8k16<T>(acc, even, q.x, q.y);
                const uint32_t odd[4] = {lo.z, hi.z, lo.w, hi.w};
                ptx::mma_m16n8k16<T>(acc, odd, q.z, q.w);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int half = e / 2, head = 8 * n + 2 * t + e % 2;
                const int slot = first + lane / 4 + 8 * half;
                if (slot >= count || head >= group) continue;
                const float score = token[half] >= 0
                                        ? capped_log2(acc[e] * score_scale, params.softcap)
                                        : -INFINITY;
                smem.key_scores[slot * group + head] = score;
            }
        }
    }
    __syncthreads();
}

}  // namespace condensate::kernels::decode
