// A warp's query rows in registers, what each may see, and from its scores to masses of blocks.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>

#include "device/mma_tile.h"
#include "device/softmax.h"
#include "kernels/block_select/common/scored_rows.h"
#include "kernels/block_select/common/top_blocks.h"
#include "kernels/block_select/common/unit_chunk.h"
#include "ptx/wgmma.h"

namespace condensate::kernels::block_select {

// The rows of a warp: queries in registers; positions and softmax sums in shared memory.
template <class Traits>
struct HeldRows {
    static constexpr int kMTiles = Traits::kMTiles;
    using Scores = float[kMTiles][Traits::kNTiles][4];

    typename Traits::Smem& smem;
    uint32_t queries[Traits::kDim / 16][kMTiles][4];

    __device__ explicit HeldRows(typename Traits::Smem& smem) : smem(smem) {}

    // Row of the CTA that a lane's elements 2 * half and + 1 belong to.
    static __device__ __forceinline__ int row(int m, int half) {
        return static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows + 16 * m + 8 * half +
               static_cast<int>(threadIdx.x & 31) / 4;
    }

    // Takes the warp's rows from the stages, where they lie, and position_of(row) of each.
    template <class PositionOf>
    __device__ __forceinline__ void hold(PositionOf&& position_of) {
        const int lane = threadIdx.x & 31, first = threadIdx.x / 32 * Traits::kWarpRows;
        device::load_a_tiles<Traits::kDim, kMTiles>(queries, ptx::smem_address(smem.stages), first);
        if (lane < Traits::kWarpRows) smem.position[first + lane] = position_of(first + lane);
        __syncwarp();
    }

    // Units of a level that every row of the warp sees.
    __device__ __forceinline__ int seen_by_all(const Ranges& ranges, int unit_keys) const {
        const int lane = threadIdx.x & 31;
        int position = kNoRow;
        if (lane < Traits::kWarpRows)
            position = smem.position[threadIdx.x / 32 * Traits::kWarpRows + lane];
        int units = position == kNoRow ? INT_MAX : visible_units(ranges, position, unit_keys);
        return __reduce_min_sync(0xffffffffu, units);
    }

    __device__ __forceinline__ void score(Scores& s, int stage) const {
        device::score_tile<typename Traits::T, Traits::kDim>(s, queries,
                                                             ptx::smem_address(smem.stages[stage]));
    }
    // All warps of a warpgroup must call it.
    __device__ __forceinline__ void score_by_wgmma(Scores& s, int stage) const {
        const uint64_t units = ptx::smem_operand(ptx::smem_address(smem.stages[stage]));
        ptx::pin_registers(s[0]);
        ptx::wgmma_fence();
#pragma unroll
        for (int d = 0; d < Traits::kDim / 16; ++d)
            ptx::wgmma_bt<typename Traits::T>(
                s[0], queries[d][0],
                ptx::offset_operand(units, d / 4 * Traits::kPanelBytes + d % 4 * 32), d > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::pin_registers(s[0]);
    }

    // Drops units that a row does not see. first_unit(v) is the first unit of the lane's v-th block
    // of the chunk.
    template <int kBlockUnits, class FirstUnit>
    __device__ __forceinline__ void mask(Scores& s, const Ranges& ranges, int unit_keys,
                                         FirstUnit&& first_unit) const {
        using Layout = ChunkLayout<kBlockUnits, Traits::kWgmma>;
        int visible[kMTiles][2];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                visible[m][half] = visible_units(ranges, smem.position[row(m, half)], unit_keys);
#pragma unroll
        for (int place = 0; place < 2 * Traits::kNTiles; ++place) {
            int unit = first_unit(place / Layout::kLaneUnits) + Layout::unit_in_block(place);
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (unit >= visible[m][half]) s[m][place / 2][2 * half + place % 2] = -INFINITY;
        }
    }

    // Keeps log2 of the softmax sum of each row, `log2_factor` times as large; +inf, which makes
    // every weight 0 or NaN, where that is not finite or there is no row.
    __device__ __forceinline__ void normalise(device::OnlineSoftmax<kMTiles>& softmax,
                                              float log2_factor = 0.0f) {
        softmax.reduce_sums();
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float log2_sum =
                    softmax.reference[m][half] + log2f(softmax.row_sum[m][half]) + log2_factor;
                bool finite = fabsf(log2_sum) <= FLT_MAX;  // false for NaN
                bool exists = smem.position[row(m, half)] != kNoRow;
                if ((threadIdx.x & 3) == 0)
                    smem.norm[row(m, half)] = finite && exists ? log2_sum : INFINITY;
            }
        }
        __syncwarp();
    }

    // Scores -> weights 2^(score * scale_log2 - norm), in place.
    __device__ __forceinline__ void weigh(Scores& s, float scale_log2) const {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float norm = smem.norm[row(m, half)];
#pragma unroll
                for (int n = 0; n < Traits::kNTiles; ++n)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e)
                        s[m][n][e] = ptx::exp2_approx(fmaf(s[m][n][e], scale_log2, -norm));
            }
        }
    }
};

struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// Places kFirst..kFirst + kCount - 1 of one row, combined as a tree.
template <int kFirst, int kCount, class Combine, int kMTiles, int kNTiles>
__device__ __forceinline__ float fold_places(const float (&s)[kMTiles][kNTiles][4], int m,
                                             int half) {
    if constexpr (kCount == 1) {
        return s[m][kFirst / 2][2 * half + kFirst % 2];
    } else {
        return Combine{}(fold_places<kFirst, kCount / 2, Combine>(s, m, half),
                         fold_places<kFirst + kCount / 2, kCount / 2, Combine>(s, m, half));
    }
}

// Calls body(v, m, half, value) with what Combine makes of the kUnits units that the lane holds of
// its v-th block, for v = kFrom and on.
template <int kUnits, class Combine, int kFrom = 0, int kMTiles, int kNTiles, class Body>
__device__ __forceinline__ void for_each_block(const float (&s)[kMTiles][kNTiles][4], Body&& body) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            body(kFrom, m, half, fold_places<kFrom * kUnits, kUnits, Combine>(s, m, half));
    if constexpr ((kFrom + 1) * kUnits < 2 * kNTiles)
        for_each_block<kUnits, Combine, kFrom + 1>(s, body);
}

// Of the lane's values and those of the lane `bit` away keeps one half combined, in front.
template <int kCount, class Combine>
__device__ __forceinline__ void halve(float* x, int bit, Combine combine) {
    const bool high = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
        float kept = high ? x[i + kCount / 2] : x[i], given = high ? x[i] : x[i + kCount / 2];
        x[i] = combine(kept, __shfl_xor_sync(0xffffffffu, given, bit));
    }
}
__device__ __forceinline__ float max_with_lane(float x, int bit) {
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bit));
}

// From what a lane has of blocks to the largest over the warp's rows, where its blocks are 4 v +
// lane % 4. Afterwards lane l holds blocks l and l + 32 (x[0] and x[8]) of 64, else block l %
// kCount of the 4 * kCount.
template <int kCount>
__device__ __forceinline__ void max_over_rows(float (&x)[kCount]) {
    if constexpr (kCount == 16) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            halve<8>(x + 8 * w, 16, Max{});
            halve<4>(x + 8 * w, 8, Max{});
            halve<2>(x + 8 * w, 4, Max{});
        }
    } else if constexpr (kCount == 4) {
        halve<4>(x, 8, Max{});
        halve<2>(x, 4, Max{});
        x[0] = max_with_lane(x[0], 16);
    } else {
        static_assert(kCount == 2 || kCount == 1, "1, 4, 8 or 64 units a block");
        if constexpr (kCount == 2)
            halve<2>(x, 4, Max{});
        else
            x[0] = max_with_lane(x[0], 4);
        x[0] = max_with_lane(max_with_lane(x[0], 16), 8);
    }
}

// Scan: log2 of the weight of the hottest unit of the chunk's blocks over the warp's rows.
// Afterwards lane l holds blocks l and l + 32 (the first two of the result) of 64, block l % 16 of
// 16, l % 8 of 8; of units in order, block l / 4 of 8.
template <int kBlockUnits, class Traits>
__device__ __forceinline__ float2 hottest_units(const HeldRows<Traits>& rows,
                                                const typename HeldRows<Traits>::Scores& s,
                                                float scale_log2) {
    using Layout = ChunkLayout<kBlockUnits, Traits::kWgmma>;
    constexpr int kMTiles = Traits::kMTiles;
    float norm[kMTiles][2];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) norm[m][half] = rows.smem.norm[rows.row(m, half)];
    float log2_weight[Layout::kLaneBlocks] = {};
    for_each_block<Layout::kLaneUnits, Max>(s, [&](int v, int m, int half, float score) {
        const float x = fmaf(score, scale_log2, -norm[m][half]);
        log2_weight[v] = m + half == 0 ? x : fmaxf(log2_weight[v], x);
    });
    if constexpr (Layout::kInOrder) {  // four neighbouring lanes share each block
        halve<8>(log2_weight, 16, Max{});
        halve<4>(log2_weight, 8, Max{});
        halve<2>(log2_weight, 4, Max{});
        log2_weight[0] = max_with_lane(max_with_lane(log2_weight[0], 1), 2);
    } else {
        max_over_rows(log2_weight);
    }
    constexpr int kSecond = Layout::kBlocks == 64 ? 8 : 0;
    return {log2_weight[0], log2_weight[kSecond]};
}

// Refinement: masses of the chunk's blocks, the largest over the warp's rows, from their weights;
// lane l returns that of block l % 8 of 8, or of the only one.
template <int kBlockUnits, bool kWgmma, int kNTiles>
__device__ __forceinline__ float chunk_masses(const float (&s)[1][kNTiles][4]) {
    using Layout = ChunkLayout<kBlockUnits, kWgmma>;
    constexpr int kLaneBlocks = Layout::kLaneBlocks;
    float part[2][kLaneBlocks];
    for_each_block<Layout::kLaneUnits, Sum>(s, [&](int v, int, int half, float weight) {
        // Bits of v in the order in which lanes are told apart by them below.
        part[half][kLaneBlocks == 8 ? v / 2 % 2 * 4 + v % 2 * 2 + v / 4 : v] = weight;
    });
    if constexpr (Layout::kInOrder) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (kLaneBlocks == 8) {
                halve<8>(part[half], 2, Sum{});
                halve<4>(part[half], 1, Sum{});
            } else {
                part[half][0] = device::quad_sum(part[half][0]);
            }
        }
    }
    constexpr int kLeft = kLaneBlocks == 8 ? 2 : kLaneBlocks;
    float mass[kLeft];
#pragma unroll
    for (int i = 0; i < kLeft; ++i) mass[i] = fmaxf(fmaxf(part[0][i], part[1][i]), 0.0f);
    max_over_rows(mass);
    return finite_mass(mass[0]);
}

}  // namespace condensate::kernels::block_select
