// Scores of all whole units by their 8-bit mean keys: registers straight from memory, products of
// 8-bit integers, exact. A lane's 16 bytes of a unit and of a query are the same channels, in
// whatever order the products take them.
#pragma once

#include "device/element.h"
#include "device/softmax.h"
#include "kernels/decode/common/cache_view.h"
#include "kernels/decode/selected/sums.h"
#include "ptx/math.h"
#include "ptx/matrix.h"

namespace condensate::kernels::decode {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / 32;
constexpr int kScanSteps = kChunkUnits / 16 / kScanWarps;  // of 16 units, of a warp
constexpr int kScanRows = 64;  // query rows, heads by positions, that a CTA takes

// Scores are kept in log2: s * log2(e), soft-capped first.
__device__ __forceinline__ float capped_log2(float score, float softcap) {
    if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
    return score * device::kLog2E;
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

// Loads are not conditional: that would keep them apart. A unit that is not there reads another's.
template <int kDim, class CacheT>
__device__ __forceinline__ void load_units(UnitRows<kDim>& units, const CacheView<CacheT>& cache,
                                           int first, int end) {
    const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = min(first + lane / 4 + 8 * half, end - 1) * kUnitKeys;
        const int32_t page = cache.page_or_any(token, &units.exists[half]);
        const int32_t row = cache.unit_row(token);
        const int8_t* data = cache.rows + page * cache.rows_stride_page + row * kDim;
        units.scale[half] = __ldg(cache.scales + page * cache.scales_stride_page + row);
#pragma unroll
        for (int p = 0; p < UnitRows<kDim>::kPairs; ++p)
            units.pair[half][p] = __ldg(reinterpret_cast<const uint4*>(data + 64 * p + 16 * t));
        if constexpr (UnitRows<kDim>::kOdd)
            units.odd[half] =
                __ldg(reinterpret_cast<const uint2*>(data + 64 * UnitRows<kDim>::kPairs + 8 * t));
    }
}

// acc: units lane / 4 (0, 1) and lane / 4 + 8 (2, 3) by rows 2 * (lane % 4) and + 1 of `query`,
// eight 8-bit rows in shared memory.
template <int kDim>
__device__ __forceinline__ void score_units(int32_t (&acc)[4], const UnitRows<kDim>& units,
                                            const int8_t* query) {
    const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
    const int8_t* row = query + lane / 4 * kDim;
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[e] = 0;
#pragma unroll
    for (int p = 0; p < UnitRows<kDim>::kPairs; ++p) {
        const uint4 q = *reinterpret_cast<const uint4*>(row + 64 * p + 16 * t);
        const uint4 &lo = units.pair[0][p], &hi = units.pair[1][p];
        const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y};
        ptx::mma_m16n8k32_s8(acc, first, q.x, q.y);
        const uint32_t second[4] = {lo.z, hi.z, lo.w, hi.w};
        ptx::mma_m16n8k32_s8(acc, second, q.z, q.w);
    }
    if constexpr (UnitRows<kDim>::kOdd) {
        const uint2 q = *reinterpret_cast<const uint2*>(row + 64 * UnitRows<kDim>::kPairs + 8 * t);
        const uint32_t last[4] = {units.odd[0].x, units.odd[1].x, units.odd[0].y, units.odd[1].y};
        ptx::mma_m16n8k32_s8(acc, last, q.x, q.y);
    }
}

template <int kDim>
struct ScanSmem {
    int8_t query[kScanRows][kDim];
    float factor[kScanRows];  // of the 8-bit row, with the score's scale
    float center[kScanRows];
    int32_t units[kScanRows];                  // that the row sees, whole
    int32_t first[kScanRows], end[kScanRows];  // of those, what holds candidates
    ScoreSums sums[kScanWarps][kScanRows];
};

// Row r is head r % G of position r / G; rows past the last are 0. A warp a row.
template <class T, int kDim>
__device__ void load_scan_rows(ScanSmem<kDim>& smem, const DecodeParams& params, int64_t sequence,
                               int64_t kv_head, int64_t length, int pool, int first_row, int rows) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int group = params.group();
    const float* center =
        params.summaries.key_center ? params.summaries.key_center + kv_head * kDim : nullptr;
    const int padded = (rows + 7) / 8 * 8;
    for (int r = warp; r < padded; r += kScanWarps) {
        constexpr int kEach = (kDim + 31) / 32;
        float x[kEach], largest = 0.0f, dot = 0.0f;
        const int position = (first_row + r) / group, head = (first_row + r) % group;
        const T* query = static_cast<const T*>(params.query.data) +
                         sequence * params.query.stride_batch +
                         (kv_head * group + head) * params.query.stride_head +
                         position * params.query.stride_seq;
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            x[e] = r < rows ? to_float(query[lane + 32 * e]) : 0.0f;
            largest = fmaxf(largest, fabsf(x[e]));
            if (center) dot += x[e] * center[lane + 32 * e];
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
            dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        }
        const float inverse = largest > 0.0f ? __fdiv_rn(127.0f, largest) : 0.0f;
#pragma unroll
        for (int e = 0; e < kEach; ++e)
            smem.query[r][lane + 32 * e] = static_cast<int8_t>(
                __float2int_rn(fminf(fmaxf(__fmul_rn(x[e], inverse), -127.0f), 127.0f)));
        if (lane == 0) {
            const DecodeSpan span = decode_span(length - params.query_len + position, params.window,
                                                params.anchors, pool);
            smem.factor[r] = __fmul_rn(__fdiv_rn(largest, 127.0f), params.scale);
            smem.center[r] = params.scale * dot;
            smem.units[r] = r < rows ? span.units : 0;
            smem.first[r] = span.first_unit();
            smem.end[r] = span.end_unit();
        }
    }
}

// A chunk of 256 units of one sequence and KV head, for up to 64 query rows.
template <class T, class CacheT, int kDim>
__global__ void __launch_bounds__(kScanThreads)
    decode_scan_kernel(const __grid_constant__ DecodeParams params,
                       const __grid_constant__ Sizes sizes, uint8_t* workspace,
                       uint32_t* error_word) {
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<ScanSmem<kDim>*>(smem_bytes);
    const int chunk = static_cast<int>(blockIdx.x), group = params.group();
    const int32_t sequence =
        static_cast<int32_t>(blockIdx.y / static_cast<uint32_t>(params.kv_heads));
    const int32_t kv_head =
        static_cast<int32_t>(blockIdx.y % static_cast<uint32_t>(params.kv_heads));
    const int queries = static_cast<int>(params.query_len);
    const int first_row = static_cast<int>(blockIdx.z) * kScanRows;
    const int rows = min(group * queries - first_row, kScanRows);
    const int64_t first_item = static_cast<int64_t>(blockIdx.y) * queries;
    if (chunk == 0 && blockIdx.z == 0 && static_cast<int>(threadIdx.x) < queries)
        Record(workspace, sizes, first_item + threadIdx.x).header->attended = 0;
    const bool paged = params.cache.block_table != nullptr;
    const int pool = pool_keys(params.cache.page_size, paged);
    const int64_t length =
        max_i64(min_i64(params.cache.lengths[sequence], params.cache.capacity()), 0);
    // The last query sees most; a sequence that is attended densely needs no scan.
    const DecodeSpan last = decode_span(length - 1, params.window, params.anchors, pool);
    if (chunk * kChunkUnits >= last.units) return;
    if (params.mode == DecodeMode::kSelectAndAttend && attends_densely(last, params.shortlist))
        return;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int t = lane % 4, begin = chunk * kChunkUnits;

    const CacheView<CacheT> cache(params.cache, params.summaries, sequence, kv_head);
    UnitRows<kDim> units[kScanSteps];
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s)
        load_units(units[s], cache, begin + 16 * (kScanSteps * warp + s), last.units);
    load_scan_rows<T, kDim>(smem, params, sequence, kv_head, length, pool, first_row, rows);
    __syncthreads();

    bool missing = false;  // a page that the sequence needs
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) missing |= !units[s].exists[0] || !units[s].exists[1];
    if (missing) atomicOr(error_word, kErrorBlockTable);

    for (int n = 0; n < rows; n += 8) {
        float* scores[2];  // of the lane's rows, null past the last
        float factor[2], center[2];
        int32_t seen[2], first[2], last_candidate[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = n + 2 * t + c;
            const int place = first_row + row;
            scores[c] =
                row < rows ? Record(workspace, sizes, first_item + place / group).unit_scores +
                                 place % group + (begin + 16 * kScanSteps * warp + lane / 4) * group
                           : nullptr;
            factor[c] = smem.factor[row];
            center[c] = smem.center[row];
            seen[c] = smem.units[row];
            first[c] = smem.first[row];
            last_candidate[c] = smem.end[row];
        }
        float score[kScanSteps][4], largest[2] = {-INFINITY, -INFINITY};
        float selectable[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int s = 0; s < kScanSteps; ++s) {
            int32_t acc[4];
            score_units<kDim>(acc, units[s], smem.query[n]);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int c = e % 2;
                const int unit = begin + 16 * (kScanSteps * warp + s) + lane / 4 + 8 * (e / 2);
                float x = __fmaf_rn(static_cast<float>(acc[e]),
                                    __fmul_rn(units[s].scale[e / 2], factor[c]), center[c]);
                x = capped_log2(x, params.softcap);
                // What does not exist, or is NaN, says nothing.
                if (!units[s].exists[e / 2] || unit >= seen[c] || !(x == x)) x = -INFINITY;
                score[s][e] = x;
                largest[c] = fmaxf(largest[c], x);
                if (unit >= first[c] && unit < last_candidate[c])
                    selectable[c] = fmaxf(selectable[c], x);
                if (scores[c] && unit < last.units) scores[c][(16 * s + 8 * (e / 2)) * group] = x;
            }
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float reference = largest[c];
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                reference = fmaxf(reference, __shfl_xor_sync(0xffffffffu, reference, offset));
                selectable[c] =
                    fmaxf(selectable[c], __shfl_xor_sync(0xffffffffu, selectable[c], offset));
            }
            const float finite = device::finite_reference(reference);
#pragma unroll
            for (int s = 0; s < kScanSteps; ++s)
                sum[c] += ptx::exp2_approx(score[s][c] - finite) +
                          ptx::exp2_approx(score[s][c + 2] - finite);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2)
                sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], offset);
            if (lane < 4) smem.sums[warp][n + 2 * t + c] = {reference, sum[c], selectable[c], 0.0f};
        }
    }
    __syncthreads();
    for (int row = static_cast<int>(threadIdx.x); row < rows; row += kScanThreads) {
        ScoreSums total = smem.sums[0][row];
        for (int w = 1; w < kScanWarps; ++w) total = merge(total, smem.sums[w][row]);
        const int place = first_row + row;
        Record(workspace, sizes, first_item + place / group)
            .chunk_sums[place % group * sizes.chunks + chunk] = total;
    }
}

}  // namespace condensate::kernels::decode
