// From unit scores in accumulator layout to the softmax mass of blocks, per pooled query and tile.
#pragma once

#include <cuda_bf16.h>

#include <cfloat>
#include <cmath>

#include "device/softmax.h"
#include "kernels/block_select/traits.h"

namespace condensate::kernels::block_select {

// How a lane sees the blocks of kNTiles * 8 consecutive units after the row's quad has been summed.
//   16 units a block: each lane ends with the block(s) that lane % 4 names
//    4 units a block: two blocks per 8 units, lanes 0-1 and 2-3 of a quad
//    1 unit a block:  the lane's own elements
template <int kUnitsPerBlock, int kNTiles>
struct LaneBlocks {
    static constexpr int kCount = kUnitsPerBlock == 16  ? 1
                                  : kUnitsPerBlock == 4 ? kNTiles
                                                        : 2 * kNTiles;

    // Index among the group's blocks of this lane's value v.
    static __device__ __forceinline__ int index(int v) {
        int t = threadIdx.x & 3;
        if constexpr (kUnitsPerBlock == 16) return t * (kNTiles / 2) / 4;
        if constexpr (kUnitsPerBlock == 4) return 2 * v + (t >> 1);
        return 8 * (v >> 1) + 2 * t + (v & 1);
    }
    // Does this lane own the value alone? (Copies on other lanes of the quad are left out.)
    static __device__ __forceinline__ bool owner() {
        int t = threadIdx.x & 3;
        if constexpr (kUnitsPerBlock == 16) return t % (8 / kNTiles) == 0;
        if constexpr (kUnitsPerBlock == 4) return (t & 1) == 0;
        return true;
    }
    // Sums the weights of one row (elements 2 * half and + 1 of each 8-unit tile) by block.
    static __device__ __forceinline__ void sum(const float (&p)[kNTiles][4], int half,
                                               float (&total)[kCount]) {
        constexpr unsigned kAll = 0xffffffffu;
        if constexpr (kUnitsPerBlock == 16) {
            constexpr int kBlocks = kNTiles / 2;
            float part[kBlocks];
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                part[b] = (p[2 * b][2 * half] + p[2 * b][2 * half + 1]) +
                          (p[2 * b + 1][2 * half] + p[2 * b + 1][2 * half + 1]);
            }
            total[0] = reduce_scatter(part);
        } else {
#pragma unroll
            for (int n = 0; n < kNTiles; ++n) {
                float left = p[n][2 * half], right = p[n][2 * half + 1];
                if constexpr (kUnitsPerBlock == 4) {
                    total[n] = left + right;
                    total[n] += __shfl_xor_sync(kAll, total[n], 1);
                } else {
                    total[2 * n] = left;
                    total[2 * n + 1] = right;
                }
            }
        }
        // A block with a score that is not finite has no mass.
#pragma unroll
        for (int v = 0; v < kCount; ++v) total[v] = total[v] <= FLT_MAX ? total[v] : 0.0f;
    }

  private:
    // Sums over the quad; of four (two, one) sums lane t keeps number t (t / 2, 0).
    template <int kBlocks>
    static __device__ __forceinline__ float reduce_scatter(const float (&part)[kBlocks]) {
        constexpr unsigned kAll = 0xffffffffu;
        bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
        if constexpr (kBlocks == 4) {
            float a = high ? part[2] : part[0], b = high ? part[3] : part[1];
            a += __shfl_xor_sync(kAll, high ? part[0] : part[2], 2);
            b += __shfl_xor_sync(kAll, high ? part[1] : part[3], 2);
            return (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, 1);
        } else if constexpr (kBlocks == 2) {
            float a =
                (high ? part[1] : part[0]) + __shfl_xor_sync(kAll, high ? part[0] : part[1], 2);
            return a + __shfl_xor_sync(kAll, a, 1);
        } else {
            return device::quad_sum(part[0]);
        }
    }
};

// Softmax normaliser of each of a lane's rows, grown chunk by chunk, and the reference by which
// masses are expressed until the final normaliser is known.
template <int kMTiles>
struct RowNormaliser {
    float exponent[kMTiles][2];  // log2 units: weights are 2^(score * scale_log2 - exponent)
    float sum[kMTiles][2];       // of this lane's blocks' weights
    float kept[kMTiles][2];      // the part of it in blocks that need no selection
    float inverse[kMTiles][2];   // weight -> mass by the reference

    __device__ RowNormaliser() {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                exponent[m][half] = -INFINITY;
                sum[m][half] = kept[m][half] = 0.0f;
                inverse[m][half] = 1.0f;
            }
        }
    }

    // Adds one row's weights by block.
    template <class Blocks>
    __device__ void add(int m, int half, const float (&total)[Blocks::kCount]) {
        float weight = total[0];
#pragma unroll
        for (int v = 1; v < Blocks::kCount; ++v) weight += total[v];
        sum[m][half] += Blocks::owner() ? weight : 0.0f;
    }
    template <class Blocks>
    __device__ void keep(int m, int half, const float (&total)[Blocks::kCount],
                         const bool (&kept_block)[Blocks::kCount]) {
#pragma unroll
        for (int v = 0; v < Blocks::kCount; ++v)
            kept[m][half] += kept_block[v] && Blocks::owner() ? total[v] : 0.0f;
    }

    // Raises exponents that these scores exceed by more than kHeadroom; weights stay below
    // 2^kHeadroom, far from overflow, and most chunks need no quad reduction and no rescaling.
    template <int kNTiles>
    __device__ void raise(const float (&s)[kMTiles][kNTiles][4], float scale_log2) {
        constexpr float kHeadroom = 8.0f;
        bool exceeded = false;
        float largest[kMTiles][2];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = -INFINITY;
#pragma unroll
                for (int n = 0; n < kNTiles; ++n)
                    x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                largest[m][half] = x * scale_log2;
                exceeded |= largest[m][half] > exponent[m][half] + kHeadroom;
            }
        }
        if (!__any_sync(0xffffffffu, exceeded)) return;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float previous = exponent[m][half];
                float current = fminf(fmaxf(previous, device::quad_max(largest[m][half])), FLT_MAX);
                float shift =
                    device::finite_reference(current) - device::finite_reference(previous);
                exponent[m][half] = current;
                sum[m][half] *= ptx::exp2_approx(-shift);
                kept[m][half] *= ptx::exp2_approx(-shift);
                inverse[m][half] *= ptx::exp2_approx(shift);
            }
        }
    }

    // Makes the normaliser so far the reference and returns its log2: -inf when nothing was seen
    // and `is_final`, else 0 is as good a reference as any.
    __device__ float refer(int m, int half, bool is_final) {
        float total = device::quad_sum(sum[m][half]);
        inverse[m][half] = total > 0.0f ? 1.0f / total : is_final ? 0.0f : 1.0f;
        float exponent_now = device::finite_reference(exponent[m][half]);
        return total > 0.0f ? exponent_now + log2f(total) : is_final ? -INFINITY : exponent_now;
    }
};

// Scores -> weights 2^(score * scale_log2 - exponent), in place.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void weigh(float (&s)[kMTiles][kNTiles][4],
                                      const RowNormaliser<kMTiles>& rows, float scale_log2) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float reference = device::finite_reference(rows.exponent[m][half]);
#pragma unroll
            for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e)
                    s[m][n][e] = ptx::exp2_approx(fmaf(s[m][n][e], scale_log2, -reference));
            }
        }
    }
}

// Maximum over the eight rows that the lanes with the same lane % 4 hold, of two bfloat16 at once.
__device__ __forceinline__ uint32_t group_max2(uint32_t x) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, x, step);
        __nv_bfloat162 larger = __hmax2(*reinterpret_cast<__nv_bfloat162*>(&x),
                                        *reinterpret_cast<__nv_bfloat162*>(&other));
        x = *reinterpret_cast<uint32_t*>(&larger);
    }
    return x;
}
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

}  // namespace condensate::kernels::block_select
