// Weighted sums of rows: the values of attended keys, and the mean values of pools that stand for
// the others.
#pragma once

#include "kernels/decode/common/cache_elements.h"
#include "kernels/decode/common/cache_view.h"
#include "kernels/decode/selected/exchange.h"
#include "ptx/math.h"

namespace condensate::kernels::decode {

// A warp's lanes side by side on rows of kDim elements, 8 each.
template <int kDim>
struct RowLanes {
    static constexpr int kPerRow = kDim / 8;
    static constexpr int kRows = 32 / kPerRow;  // at once
    int sub, channel;
    bool active;
    __device__ RowLanes() {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        sub = lane / kPerRow;
        channel = 8 * (lane % kPerRow);
        active = sub < kRows;
    }
};

using HeadAccumulators = float[kHeadsAtOnce][8];

// acc += weight of the head * 8 elements of a row.
__device__ __forceinline__ void accumulate_row(HeadAccumulators& acc,
                                               const float (&weight)[kHeadsAtOnce],
                                               const float (&row)[8]) {
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h)
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[h][e] += weight[h] * row[e];
}

// Values of the keys in listed[0, count), by their scores. Heads [head, head + 4).
template <class T, int kDim, class CacheT>
__device__ void accumulate_values(HeadAccumulators& acc, const SmemArrays& smem,
                                  const CacheView<CacheT>& cache, int group, int head,
                                  float value_scale, int count) {
    constexpr int kBatch = 4;  // rows of a lane that are under way at once
    const RowLanes<kDim> lanes;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    constexpr int kStride = kWarps * RowLanes<kDim>::kRows;
    const int mine = warp * RowLanes<kDim>::kRows + lanes.sub;
    if (!lanes.active) return;
    for (int first = mine; first < count; first += kBatch * kStride) {
        uint4 rows[kBatch];
        int slot[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int i = first + b * kStride;
            slot[b] = i < count ? smem.listed[i] : -1;
            if (slot[b] < 0) continue;
            const int32_t token = smem.slot_key[slot[b]];
            rows[b] = load_8<T>(cache.value_row(cache.page_of(token), token) + lanes.channel);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (slot[b] < 0) continue;
            const uint32_t pairs[4] = {rows[b].x, rows[b].y, rows[b].z, rows[b].w};
            float row[8], weight[kHeadsAtOnce];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 two = floats_of(pairs[e], T{});
                row[2 * e] = two.x;
                row[2 * e + 1] = two.y;
            }
#pragma unroll
            for (int h = 0; h < kHeadsAtOnce; ++h)
                weight[h] = head + h < group
                                ? ptx::exp2_approx(smem.key_scores[slot[b] * group + head + h] -
                                                   smem.fixed->reference[head + h]) *
                                      value_scale
                                : 0.0f;
            accumulate_row(acc, weight, row);
        }
    }
}

// Mean values of the pools of far_token[0, count), by far_weight.
template <int kDim, class CacheT>
__device__ void accumulate_pools(HeadAccumulators& acc, const Smem& smem,
                                 const CacheView<CacheT>& cache, int count) {
    const RowLanes<kDim> lanes;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (!lanes.active) return;
    for (int i = warp * RowLanes<kDim>::kRows + lanes.sub; i < count;
         i += kWarps * RowLanes<kDim>::kRows) {
        const int32_t token = smem.far_token[i];
        const int32_t page = token >= 0 ? cache.page_of(token) : -1;
        if (page < 0) continue;
        const int32_t record_row = cache.pool_row(token);
        const float scale = cache.scales[page * cache.scales_stride_page + record_row];
        const uint2 bytes = __ldg(reinterpret_cast<const uint2*>(
            cache.rows + page * cache.rows_stride_page + record_row * kDim + lanes.channel));
        float row[8], weight[kHeadsAtOnce];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const uint32_t word = e < 4 ? bytes.x : bytes.y;
            row[e] = static_cast<float>(static_cast<int8_t>(word >> (8 * (e % 4)))) * scale;
        }
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) weight[h] = smem.far_weight[i][h];
        accumulate_row(acc, weight, row);
    }
}

// The CTA's sums of heads [head, head + 4) over its lanes and warps, in a fixed order, to `partial`
// [G][D] of this CTA.
template <int kDim>
__device__ void store_partial(HeadAccumulators& acc, float* accumulators, float* partial, int group,
                              int head) {
    const RowLanes<kDim> lanes;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float sum = acc[h][e];
#pragma unroll
            for (int s = 1; s < RowLanes<kDim>::kRows; ++s)
                sum +=
                    __shfl_sync(0xffffffffu, acc[h][e], (lane + s * RowLanes<kDim>::kPerRow) % 32);
            acc[h][e] = sum;  // of use in the lanes of the first row
        }
    __syncthreads();  // whoever read the accumulators before is done
    if (lane < RowLanes<kDim>::kPerRow) {
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h)
#pragma unroll
            for (int e = 0; e < 8; ++e)
                accumulators[(warp * kHeadsAtOnce + h) * kDim + 8 * lane + e] = acc[h][e];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kHeadsAtOnce * kDim; i += kThreads) {
        if (head + i / kDim >= group) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += accumulators[w * kHeadsAtOnce * kDim + i];
        partial[head * kDim + i] = sum;
    }
}

}  // namespace condensate::kernels::decode
