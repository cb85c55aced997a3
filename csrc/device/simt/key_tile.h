// Scores on CUDA cores: any element type, stride and alignment, float32 arithmetic. A CTA stages 32
// keys in shared memory as float32; each warp scores four query rows, one key per lane. Every simt
// kernel that scores keys calls score_rows, so a score is the same float wherever it is computed.
#pragma once

#include <cstdint>

#include "condensate/kv_view.h"
#include "device/element.h"

namespace condensate::kernels::simt {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpRows = 4;
constexpr int kCtaRows = kWarps * kWarpRows;
constexpr int kTileKeys = 32;

struct Lane {
    int warp = static_cast<int>(threadIdx.x) / 32;
    int lane = static_cast<int>(threadIdx.x) % 32;
    __device__ int row(int r) const { return warp * kWarpRows + r; }  // of the CTA
};

// float32 rows in shared memory; a stride of kDim + 1 lets 32 lanes read 32 rows without conflicts.
template <int kDim>
struct KeyTile {
    static constexpr int kStride = kDim + 1;
    float element[kTileKeys * kStride];
};

// Copies rows first..first+31, as far as they lie before `end`; the others are zero.
// All threads call it, between barriers.
template <class T>
__device__ __forceinline__ void stage_rows(float* tile_smem, int tile_stride, const KvView& rows,
                                           int64_t first, int64_t end, int dim) {
    Lane lane;
#pragma unroll
    for (int r = lane.warp; r < kTileKeys; r += kWarps) {
        bool exists = first + r < end;
        const T* src = rows.row<T>(first + r);
        for (int d = lane.lane; d < dim; d += 32) {
            tile_smem[r * tile_stride + d] = exists ? to_float(src[d]) : 0.0f;
        }
    }
}

// acc[r] += query row r · this lane's key over `dim` channels (a multiple of 4): one accumulator
// per row, channels ascending.
__device__ __forceinline__ void accumulate_products(float (&acc)[kWarpRows],
                                                    const float* queries_smem, int query_stride,
                                                    const float* key_smem, int dim) {
#pragma unroll 2
    for (int d = 0; d < dim; d += 4) {
        float key[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) key[i] = key_smem[d + i];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            float4 query = *reinterpret_cast<const float4*>(queries_smem + r * query_stride + d);
            acc[r] = __fmaf_rn(query.x, key[0], acc[r]);
            acc[r] = __fmaf_rn(query.y, key[1], acc[r]);
            acc[r] = __fmaf_rn(query.z, key[2], acc[r]);
            acc[r] = __fmaf_rn(query.w, key[3], acc[r]);
        }
    }
}

// scale * q·k of the warp's four rows and this lane's key.
__device__ __forceinline__ void score_rows(float (&score)[kWarpRows], const float* queries_smem,
                                           int query_stride, const float* key_smem, int dim,
                                           float scale) {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) score[r] = 0.0f;
    accumulate_products(score, queries_smem, query_stride, key_smem, dim);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) score[r] = __fmul_rn(score[r], scale);
}

// Reads one query row of this warp as float32; zeros when `src` is null.
template <class T>
__device__ __forceinline__ void load_query(float* query_smem, const T* src, int dim) {
    for (int d = static_cast<int>(threadIdx.x) % 32; d < dim; d += 32) {
        query_smem[d] = src ? to_float(src[d]) : 0.0f;
    }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    }
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The exponent's reference: -inf (nothing seen yet) must not turn -inf scores into NaN.
__device__ __forceinline__ float finite_reference(float largest) {
    return largest == -INFINITY ? 0.0f : largest;
}

// One lane's share of a row's sum of exponentials: sum * exp(largest).
struct LaneSum {
    float largest = -INFINITY;
    float sum = 0.0f;

    __device__ __forceinline__ void add(float score) {
        if (score == -INFINITY) return;
        float factor = expf(-fabsf(score - largest));
        if (score > largest) {
            sum = fmaf(sum, factor, 1.0f);
            largest = score;
        } else {
            sum += factor;  // NaN comes here too, and stays
        }
    }
    // The whole row's sum on every lane.
    __device__ __forceinline__ LaneSum over_warp() const {
        LaneSum row;
        row.largest = warp_max(largest);
        row.sum = warp_sum(sum * expf(largest - finite_reference(row.largest)));
        return row;
    }
    // The sum of a group of so many consecutive lanes, a power of two, on each of them.
    __device__ __forceinline__ LaneSum over_lanes(int lanes) const {
        LaneSum group{largest, 0.0f};
        for (int offset = lanes / 2; offset > 0; offset /= 2)
            group.largest =
                fmaxf(group.largest, __shfl_xor_sync(0xffffffffu, group.largest, offset));
        group.sum = sum * expf(largest - finite_reference(group.largest));
        for (int offset = lanes / 2; offset > 0; offset /= 2)
            group.sum += __shfl_xor_sync(0xffffffffu, group.sum, offset);
        return group;
    }
    __device__ __forceinline__ float lse() const {
        return sum == 0.0f ? -INFINITY : largest + logf(sum);
    }
};

}  // namespace condensate::kernels::simt
