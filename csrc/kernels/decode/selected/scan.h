// Scores of all whole units by their 8-bit mean keys: registers straight from memory, products of
// 8-bit integers, exact. A lane's 16 bytes of a unit and of a query are the same channels, in
// whatever order the products take them.
#pragma once

#include "device/element.h"
#include "device/softmax.h"
#include "kernels/decode/common/cache_view.h"
#include "kernels/decode/selected/exchange.h"
#include "ptx/matrix.h"

namespace condensate::kernels::decode {

// Scores are kept in log2: s * log2(e), soft-capped first. NaN is -inf: a unit that says nothing.
__device__ __forceinline__ float capped_log2(float score, float softcap) {
    if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
    return score * device::kLog2E;
}

__device__ __forceinline__ ScoreSums merge(const ScoreSums& a, const ScoreSums& b) {
    const float largest = fmaxf(a.largest, b.largest);
    const float reference = device::finite_reference(largest);
    return {largest,
            a.sum * ptx::exp2_approx(a.largest - reference) +
                b.sum * ptx::exp2_approx(b.largest - reference),
            fmaxf(a.selectable, b.selectable)};
}

// Tells the group the sums of this CTA's scores [count][group]. is_candidate(i): can item i be
// selected? A thread keeps to one head.
template <class IsCandidate>
__device__ void tell_sums(Smem& smem, const float* scores, int count, int group, ScoreSums* told,
                          IsCandidate&& is_candidate) {
    const int rows = kThreads / group, thread = static_cast<int>(threadIdx.x);
    const int first = thread / group, head = thread % group;
    ScoreSums sums = {-INFINITY, 0.0f, -INFINITY};
    if (first < rows) {
        for (int i = first; i < count; i += rows) {
            const float score = scores[i * group + head];
            sums.largest = fmaxf(sums.largest, score);
            if (is_candidate(i)) sums.selectable = fmaxf(sums.selectable, score);
        }
        const float reference = device::finite_reference(sums.largest);
        for (int i = first; i < count; i += rows)
            sums.sum += ptx::exp2_approx(scores[i * group + head] - reference);
    }
    __syncthreads();
    smem.thread_sums[thread] = sums;
    __syncthreads();
    for (int h = thread / 32; h < group; h += kWarps) {
        ScoreSums total = {-INFINITY, 0.0f, -INFINITY};
        for (int row = thread % 32; row < rows; row += 32)
            total = merge(total, smem.thread_sums[row * group + h]);
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
            total = merge(total, {__shfl_xor_sync(0xffffffffu, total.largest, offset),
                                  __shfl_xor_sync(0xffffffffu, total.sum, offset),
                                  __shfl_xor_sync(0xffffffffu, total.selectable, offset)});
        if (thread % 32 == 0) told[h] = total;
    }
}

// One head's query: the compute type, and 8-bit integers with their factor. A warp a head.
template <class T, int kDim>
__device__ void load_query(const SmemArrays& smem, const DecodeParams& params, int64_t sequence,
                           int64_t kv_head, int64_t position) {
    const int64_t stride_head = params.query.stride_head;
    const T* query = static_cast<const T*>(params.query.data) +
                     sequence * params.query.stride_batch + kv_head * params.group() * stride_head +
                     position * params.query.stride_seq;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const float* center =
        params.summaries.key_center ? params.summaries.key_center + kv_head * kDim : nullptr;
    T* rows = static_cast<T*>(smem.query);
    for (int head = warp; head < kMaxDecodeGroup; head += kWarps) {
        const bool exists = head < params.group();
        float largest = 0.0f, dot = 0.0f;
        for (int c = lane; c < kDim; c += 32) {
            const T element = exists ? query[head * stride_head + c] : from_float<T>(0.0f);
            rows[head * kDim + c] = element;
            largest = fmaxf(largest, fabsf(to_float(element)));
            if (center) dot += to_float(element) * center[c];
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
            dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        }
        const float inverse = largest > 0.0f ? __fdiv_rn(127.0f, largest) : 0.0f;
        for (int c = lane; c < kDim; c += 32) {
            const float x = __fmul_rn(to_float(rows[head * kDim + c]), inverse);
            smem.query_s8[head * kDim + c] =
                static_cast<int8_t>(__float2int_rn(fminf(fmaxf(x, -127.0f), 127.0f)));
        }
        if (lane == 0) {
            smem.fixed->query_factor[head] = __fmul_rn(__fdiv_rn(largest, 127.0f), params.scale);
            smem.fixed->center_score[head] = params.scale * dot;
        }
    }
}

template <int kDim>
struct UnitRows {  // 16 units of a warp: the lane's bytes of units lane / 4 and lane / 4 + 8
    static constexpr int kPairs = kDim / 64;  // of 32-channel steps, 16 bytes each
    static constexpr bool kOdd = kDim % 64 != 0;
    uint4 pair[2][kPairs];
    uint2 odd[2];
    float scale[2];
    bool exists[2];
};

template <int kDim, class CacheT>
__device__ __forceinline__ void load_units(UnitRows<kDim>& units, const CacheView<CacheT>& cache,
                                           int first, int end, uint32_t* error_word) {
    const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int unit = first + lane / 4 + 8 * half;
        const int token = unit * kUnitKeys;
        const int32_t page = unit < end ? cache.page_of(token) : -1;
        units.exists[half] = page >= 0;
        if (unit < end && page < 0) atomicOr(error_word, kErrorBlockTable);
        const int32_t row = units.exists[half] ? cache.unit_row(token) : 0;
        const int64_t at = units.exists[half] ? page : 0;
        const int8_t* data = cache.rows + at * cache.rows_stride_page + row * kDim;
        units.scale[half] = cache.scales[at * cache.scales_stride_page + row];
#pragma unroll
        for (int p = 0; p < UnitRows<kDim>::kPairs; ++p)
            units.pair[half][p] = __ldg(reinterpret_cast<const uint4*>(data + 64 * p + 16 * t));
        if constexpr (UnitRows<kDim>::kOdd)
            units.odd[half] =
                __ldg(reinterpret_cast<const uint2*>(data + 64 * UnitRows<kDim>::kPairs + 8 * t));
    }
}

// The query rows of heads 8 n + lane / 4, the same bytes of them.
template <int kDim>
struct QueryBytes {
    uint4 pair[UnitRows<kDim>::kPairs];
    uint2 odd;
};
template <int kDim>
__device__ __forceinline__ QueryBytes<kDim> query_bytes(const int8_t* query_s8, int n) {
    const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
    const int8_t* row = query_s8 + (8 * n + lane / 4) * kDim;
    QueryBytes<kDim> bytes;
#pragma unroll
    for (int p = 0; p < UnitRows<kDim>::kPairs; ++p)
        bytes.pair[p] = *reinterpret_cast<const uint4*>(row + 64 * p + 16 * t);
    if constexpr (UnitRows<kDim>::kOdd)
        bytes.odd = *reinterpret_cast<const uint2*>(row + 64 * UnitRows<kDim>::kPairs + 8 * t);
    return bytes;
}

// acc: units lane / 4 (0, 1) and lane / 4 + 8 (2, 3) of heads 2 * (lane % 4) and + 1.
template <int kDim>
__device__ __forceinline__ void score_units(int32_t (&acc)[4], const UnitRows<kDim>& units,
                                            const QueryBytes<kDim>& query) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[e] = 0;
#pragma unroll
    for (int p = 0; p < UnitRows<kDim>::kPairs; ++p) {
        const uint4 &lo = units.pair[0][p], &hi = units.pair[1][p], &q = query.pair[p];
        const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y};
        ptx::mma_m16n8k32_s8(acc, first, q.x, q.y);
        const uint32_t second[4] = {lo.z, hi.z, lo.w, hi.w};
        ptx::mma_m16n8k32_s8(acc, second, q.z, q.w);
    }
    if constexpr (UnitRows<kDim>::kOdd) {
        const uint32_t last[4] = {units.odd[0].x, units.odd[1].x, units.odd[0].y, units.odd[1].y};
        ptx::mma_m16n8k32_s8(acc, last, query.odd.x, query.odd.y);
    }
}

// Scores units [begin, end) of this CTA into unit_scores.
template <int kDim, int kHeadTiles, class CacheT>
__device__ __noinline__ void scan_units(const SmemArrays& smem, const CacheView<CacheT>& cache,
                                        const DecodeParams& params, Exchange& exchange, int rank,
                                        int begin, int end, uint32_t* error_word) {
    constexpr int kBatch = 2;  // steps of 16 units that are under way at once
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int group = params.group(), t = lane % 4;
    QueryBytes<kDim> query[kHeadTiles];
    float factor[kHeadTiles][2], center[kHeadTiles][2];
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
        query[n] = query_bytes<kDim>(smem.query_s8, n);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            factor[n][c] = smem.fixed->query_factor[8 * n + 2 * t + c];
            center[n][c] = smem.fixed->center_score[8 * n + 2 * t + c];
        }
    }
    for (int first = begin + 16 * kBatch * warp; first < end; first += 16 * kBatch * kWarps) {
        UnitRows<kDim> units[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
            load_units(units[b], cache, first + 16 * b, end, error_word);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
            for (int n = 0; n < kHeadTiles; ++n) {
                int32_t acc[4];
                score_units<kDim>(acc, units[b], query[n]);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int half = e / 2, head = 8 * n + 2 * t + e % 2;
                    const int unit = first + 16 * b + lane / 4 + 8 * half;
                    float score = __fmaf_rn(static_cast<float>(acc[e]),
                                            __fmul_rn(units[b].scale[half], factor[n][e % 2]),
                                            center[n][e % 2]);
                    score = capped_log2(score, params.softcap);
                    if (!units[b].exists[half] || !(score == score)) score = -INFINITY;
                    if (unit >= end || head >= group) continue;
                    smem.unit_scores[(unit - begin) * group + head] = score;
                }
            }
        }
    }
    __syncthreads();
}

// The sums of all CTAs, as each of them told it.
__device__ __forceinline__ ScoreSums total_of(const ScoreSums (&told)[kGroupCtas][kMaxDecodeGroup],
                                              int head) {
    ScoreSums total = {-INFINITY, 0.0f, -INFINITY};
#pragma unroll
    for (int r = 0; r < kGroupCtas; ++r)
        total = merge(total, {__ldcg(&told[r][head].largest), __ldcg(&told[r][head].sum),
                              __ldcg(&told[r][head].selectable)});
    return total;
}

}  // namespace condensate::kernels::decode
