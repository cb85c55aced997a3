// Weighted sums of rows by mma.sync: the values of attended keys, or the mean values of pools that
// stand for the others. Rows are channels, columns heads, the products run over 16 tokens. A lane's
// 16 bytes of a token are 8 channels, of which each product takes one and the one four further. The
// last CTA of an item adds the slices up.
#pragma once

#include "device/element.h"
#include "device/softmax.h"
#include "kernels/decode/common/cache_elements.h"
#include "kernels/decode/common/cache_view.h"
#include "kernels/decode/selected/workspace.h"
#include "ptx/math.h"
#include "ptx/matrix.h"

namespace condensate::kernels::decode {

constexpr int kAttendThreads = 256;
constexpr int kAttendWarps = kAttendThreads / 32;
static_assert(kSliceRows == 16 * kAttendWarps && kSlicePools == 2 * kSliceRows,
              "a warp takes 16 rows, or twice 16 pools");

struct AttendSmem {
    alignas(16) float far_weight[kSlicePools][kMaxDecodeGroup];
    float warp_sums[kAttendWarps][kMaxDecodeGroup];
    float reference[kMaxDecodeGroup];
    float total[kMaxDecodeGroup];
    uint32_t flag;
    // then: float accumulators[kAttendWarps / 2][G][D]
};

// sums[s][j]: channels 64 s + 8 (lane / 4) + j (0, 1) and + j + 4 (2, 3) of heads 2 (lane % 4) and
// + 1 of a tile of 8 heads.
template <int kDim, int kHeadTiles>
struct HeadSums {
    static constexpr int kSets = (kDim + 63) / 64;  // of 64 channels
    float sum[kHeadTiles][kSets][4][4];

    __device__ static bool has_channels(int set) {
        return kDim % 64 == 0 || 64 * set + 8 * (static_cast<int>(threadIdx.x) % 32 / 4) < kDim;
    }
};

// One set of 64 channels of 16 tokens: rows[i] are the lane's 8 channels of tokens 2 t, 2 t + 1,
// 2 t + 8, 2 t + 9, t = lane % 4; weights[tile] those tokens' weights of head lane / 4.
template <class T>
__device__ __forceinline__ void multiply_rows(float (&sum)[4][4], const uint4 (&rows)[4],
                                              const uint32_t (&weights)[2]) {
    const uint32_t words[4][4] = {{rows[0].x, rows[0].y, rows[0].z, rows[0].w},
                                  {rows[1].x, rows[1].y, rows[1].z, rows[1].w},
                                  {rows[2].x, rows[2].y, rows[2].z, rows[2].w},
                                  {rows[3].x, rows[3].y, rows[3].z, rows[3].w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint32_t select = j % 2 ? 0x7632u : 0x5410u;
        const uint32_t a[4] = {__byte_perm(words[0][j / 2], words[1][j / 2], select),
                               __byte_perm(words[0][j / 2 + 2], words[1][j / 2 + 2], select),
                               __byte_perm(words[2][j / 2], words[3][j / 2], select),
                               __byte_perm(words[2][j / 2 + 2], words[3][j / 2 + 2], select)};
        ptx::mma_m16n8k16<T>(sum[j], a, weights[0], weights[1]);
    }
}

__device__ __forceinline__ uint32_t pack_weights(float a, float b, __half) {
    const __half2 two = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ __forceinline__ uint32_t pack_weights(float a, float b, __nv_bfloat16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
}

// Token i of the lane's four.
__device__ __forceinline__ int lane_token(int i) {
    return 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2 + 8 * (i / 2);
}

// 128 attended keys: 16 a warp. Returns the lane's sum of weights of head lane / 4 of each tile.
template <class T, int kDim, int kHeadTiles, class CacheT>
__device__ void add_values(HeadSums<kDim, kHeadTiles>& sums, float (&weight_sum)[kHeadTiles],
                           const AttendSmem& smem, const CacheView<CacheT>& cache,
                           const Record& record, int group, float value_scale, int first,
                           int count) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const CacheT* row[4];
    bool exists[4];
    float weight[kHeadTiles][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int place = first + 16 * warp + lane_token(i);
        int2 entry =
            __ldcg(reinterpret_cast<const int2*>(&record.rows[max(min(place, count - 1), 0)]));
        if (place >= count) entry = {-1, 0};
        row[i] = cache.value_row(cache.page_or_any(entry.x, &exists[i]), max(entry.x, 0)) +
                 8 * (lane / 4);
#pragma unroll
        for (int n = 0; n < kHeadTiles; ++n) {
            const int head = 8 * n + lane / 4;
            weight[n][i] = ptx::exp2_approx(
                __ldcg(&record.key_scores[entry.y * group + min(head, group - 1)]) -
                smem.reference[min(head, group - 1)]);
            if (!exists[i] || head >= group) weight[n][i] = 0.0f;
        }
    }
    Loaded8<CacheT> rows[HeadSums<kDim, kHeadTiles>::kSets][4];
#pragma unroll
    for (int set = 0; set < HeadSums<kDim, kHeadTiles>::kSets; ++set)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            rows[set][i] =
                load_8(row[i] + (HeadSums<kDim, kHeadTiles>::has_channels(set) ? 64 * set : 0));
    uint32_t weights[kHeadTiles][2];
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
        weight_sum[n] = (weight[n][0] + weight[n][1]) + (weight[n][2] + weight[n][3]);
        weights[n][0] = pack_weights(value_scale * weight[n][0], value_scale * weight[n][1], T{});
        weights[n][1] = pack_weights(value_scale * weight[n][2], value_scale * weight[n][3], T{});
    }
#pragma unroll
    for (int set = 0; set < HeadSums<kDim, kHeadTiles>::kSets; ++set) {
        uint4 elements[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            elements[i] = elements_of<T>(rows[set][i]);
            // A weight of 0 does not silence NaN.
            if (!exists[i] || !HeadSums<kDim, kHeadTiles>::has_channels(set))
                elements[i] = uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int n = 0; n < kHeadTiles; ++n)
            multiply_rows<T>(sums.sum[n][set], elements, weights[n]);
    }
}

// Eight 8-bit integers, exact in either 16-bit type.
template <class T>
__device__ __forceinline__ uint4 integers_of(uint2 bytes) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // A byte with its sign flipped below 2^23 is a float: 2^23 + 128 + the integer.
        const uint32_t word = (i < 2 ? bytes.x : bytes.y) ^ 0x80808080u;
        const float a = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + 2 * (i % 2)));
        const float b = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + 2 * (i % 2) + 1));
        pairs[i] = pack_weights(a - 8388736.0f, b - 8388736.0f, T{});
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// The weights of pools [first_pool, first_pool + kSlicePools), one a thread: of their units that
// were not looked into, each the number of its candidates by the mean of their scores.
__device__ inline void weigh_pools(AttendSmem& smem, const Record& record, const Item& item,
                                   int group, int pool_units, int first_pool) {
    static_assert(kSlicePools == kAttendThreads, "a pool a thread");
    constexpr int kUnits = kPoolKeys / kUnitKeys;  // of a pool, at most
    const int first = (first_pool + static_cast<int>(threadIdx.x)) * pool_units;
    for (int h = 0; h < group; h += 4) {
        const int more = group - 1 - h;
        float4 score[kUnits];  // all loads before their use
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const int unit = min(first + u, item.span.units - 1);
            const float* scores = record.unit_scores + int64_t{unit} * group + h;
            if (u >= pool_units)
                score[u] = {};
            else if (group % 4 == 0)
                score[u] = __ldcg(reinterpret_cast<const float4*>(scores));
            else
                score[u] = {__ldcg(scores), __ldcg(scores + min(1, more)),
                            __ldcg(scores + min(2, more)), __ldcg(scores + min(3, more))};
        }
        const float* reference = smem.reference + h;
        const float references[4] = {reference[0], reference[min(1, more)], reference[min(2, more)],
                                     reference[min(3, more)]};
        float weight[4] = {};
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const int unit = first + u;
            const bool counts = u < pool_units && unit < item.span.units;
            const int keys = counts ? item.candidates(unit) : 0;
            if (keys <= 0) continue;
            const float scores[4] = {score[u].x, score[u].y, score[u].z, score[u].w};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                weight[e] += static_cast<float>(keys) * ptx::exp2_approx(scores[e] - references[e]);
        }
        // Heads past the group lie in the same row of shared memory.
        *reinterpret_cast<float4*>(&smem.far_weight[threadIdx.x][h]) = {weight[0], weight[1],
                                                                        weight[2], weight[3]};
    }
}

// The mean values of 256 pools: 32 a warp.
template <class T, int kDim, int kHeadTiles, class CacheT>
__device__ void add_pools(HeadSums<kDim, kHeadTiles>& sums, const AttendSmem& smem,
                          const CacheView<CacheT>& cache, int group, int first_pool,
                          int32_t visible) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        const int8_t* row[4];
        float scale[4];
        int entry[4];
        bool exists[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            entry[i] = 32 * warp + 16 * step + lane_token(i);
            const int32_t token = (first_pool + entry[i]) << cache.pool_shift;
            const int32_t page = cache.page_or_any(token < visible ? token : -1, &exists[i]);
            const int32_t record_row = cache.pool_row(exists[i] ? token : 0);
            row[i] =
                cache.rows + page * cache.rows_stride_page + record_row * kDim + 8 * (lane / 4);
            scale[i] = __ldg(cache.scales + page * cache.scales_stride_page + record_row);
        }
        uint2 bytes[HeadSums<kDim, kHeadTiles>::kSets][4];
#pragma unroll
        for (int set = 0; set < HeadSums<kDim, kHeadTiles>::kSets; ++set)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                bytes[set][i] = __ldg(reinterpret_cast<const uint2*>(
                    row[i] + (HeadSums<kDim, kHeadTiles>::has_channels(set) ? 64 * set : 0)));
        uint32_t weights[kHeadTiles][2];
#pragma unroll
        for (int n = 0; n < kHeadTiles; ++n) {
            float weight[4];
            const int head = 8 * n + lane / 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float far =
                    exists[i] && head < group ? smem.far_weight[entry[i]][head] : 0.0f;
                // A pool that weighs nothing is no term, whatever its values are.
                weight[i] = far == 0.0f ? 0.0f : scale[i] * far;
            }
            weights[n][0] = pack_weights(weight[0], weight[1], T{});
            weights[n][1] = pack_weights(weight[2], weight[3], T{});
        }
#pragma unroll
        for (int set = 0; set < HeadSums<kDim, kHeadTiles>::kSets; ++set) {
            uint4 rows[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) rows[i] = integers_of<T>(bytes[set][i]);
#pragma unroll
            for (int n = 0; n < kHeadTiles; ++n)
                multiply_rows<T>(sums.sum[n][set], rows, weights[n]);
        }
    }
}

// Where the lane's sums of heads 2 t and 2 t + 1 of a tile lie in [G][D].
template <int kDim, int kHeadTiles, class Visit>
__device__ __forceinline__ void visit_sums(HeadSums<kDim, kHeadTiles>& sums, int group,
                                           Visit&& visit) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n)
#pragma unroll
        for (int set = 0; set < HeadSums<kDim, kHeadTiles>::kSets; ++set)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int head = 8 * n + 2 * (lane % 4) + e % 2;
                    const int channel = 64 * set + 8 * (lane / 4) + j + 4 * (e / 2);
                    if (head < group && channel < kDim)
                        visit(head * kDim + channel, sums.sum[n][set][j][e]);
                }
}

// The CTA's sums over its warps, in a fixed order, to `partial` [G][D].
template <int kDim, int kHeadTiles>
__device__ void store_partial(HeadSums<kDim, kHeadTiles>& sums, float* accumulators, float* partial,
                              int group) {
    constexpr int kHalf = kAttendWarps / 2;
    const int warp = static_cast<int>(threadIdx.x) / 32, elements = group * kDim;
    float* mine = accumulators + warp % kHalf * elements;
    if (warp >= kHalf) visit_sums(sums, group, [&](int i, float& x) { mine[i] = x; });
    __syncthreads();
    if (warp < kHalf) visit_sums(sums, group, [&](int i, float& x) { mine[i] += x; });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < elements; i += kAttendThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kHalf; ++w) sum += accumulators[w * elements + i];
        partial[i] = sum;
    }
}

// All slices, over the softmax's denominator, to the output.
template <class T, int kDim>
__device__ void combine(AttendSmem& smem, const DecodeParams& params, const Item& item,
                        const Record& record, const Sizes& sizes, int row_slices, int pool_slices) {
    const int group = params.group(), elements = group * kDim;
    const int far_slices = params.far_field ? pool_slices : 0;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int head = warp; head < group; head += kAttendWarps) {
        float attended = 0.0f, condensed = 0.0f;
        for (int s = lane; s < row_slices; s += 32)
            attended += __ldcg(&record.weight_sums[s * group + head]);
        for (int s = lane; s < pool_slices; s += 32)
            condensed += __ldcg(&record.weight_sums[(sizes.row_slices + s) * group + head]);
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            attended += __shfl_xor_sync(0xffffffffu, attended, offset);
            condensed += __shfl_xor_sync(0xffffffffu, condensed, offset);
        }
        if (lane != 0) continue;
        const int64_t query_head = static_cast<int64_t>(item.kv_head) * group + head;
        const float reference = smem.reference[head];
        float total = attended + (params.far_field ? condensed : 0.0f);
        if (params.sinks && item.span.visible > 0)
            total += ptx::exp2_approx(params.sinks[query_head] * device::kLog2E - reference);
        smem.total[head] = total;
        const int64_t row =
            (item.sequence * params.query_heads + query_head) * params.query_len + item.query;
        if (params.lse) params.lse[row] = (reference + log2f(total)) / device::kLog2E;
        if (params.omitted_mass_estimate) {
            const float omitted =
                item.selects ? condensed + __ldcg(&record.header->unlisted[head]) : 0.0f;
            params.omitted_mass_estimate[row] =
                omitted > 0.0f ? omitted / (attended + omitted) : 0.0f;
        }
    }
    __syncthreads();
    T* out = static_cast<T*>(params.out) + item.sequence * params.out_stride_batch +
             static_cast<int64_t>(item.kv_head) * group * params.out_stride_head +
             item.query * params.out_stride_seq;
    for (int i = static_cast<int>(threadIdx.x); i < elements; i += kAttendThreads) {
        float sum = 0.0f;
#pragma unroll 8
        for (int s = 0; s < row_slices; ++s) sum += __ldcg(&record.partial[s * elements + i]);
#pragma unroll 8
        for (int s = 0; s < far_slices; ++s)
            sum += __ldcg(&record.partial[(sizes.row_slices + s) * elements + i]);
        const float total = smem.total[i / kDim];
        out[i / kDim * params.out_stride_head + i % kDim] =
            from_float<T>(total == 0.0f ? 0.0f : sum / total);
    }
}

template <class T, class CacheT, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kAttendThreads, kDim <= 128 ? 2 : 1)
    decode_attend_kernel(const __grid_constant__ DecodeParams params,
                         const __grid_constant__ Sizes sizes, uint8_t* workspace,
                         uint32_t* error_word) {
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<AttendSmem*>(smem_bytes);
    auto* accumulators = reinterpret_cast<float*>(smem_bytes + aligned(sizeof(smem)));
    const int64_t index = blockIdx.y;
    const int slice = static_cast<int>(blockIdx.x), group = params.group();
    const Item item(params, index, error_word);
    const Record record(workspace, sizes, index);
    const CacheView<CacheT> cache(params.cache, params.summaries, item.sequence, item.kv_head);
    const int rows = __ldcg(&record.header->rows);
    const int row_slices = max((rows + kSliceRows - 1) / kSliceRows, 1);
    const int pool_units_log2 = cache.pool_shift - 3;
    const bool weighs_pools =
        item.selects && (params.far_field || params.omitted_mass_estimate != nullptr);
    const int pools =
        weighs_pools ? (item.span.units + (1 << pool_units_log2) - 1) >> pool_units_log2 : 0;
    const int pool_slices = (pools + kSlicePools - 1) / kSlicePools;
    const int pool_slice = slice - sizes.row_slices;
    if (pool_slice >= pool_slices || (pool_slice < 0 && slice >= row_slices)) return;
    if (static_cast<int>(threadIdx.x) < group)
        smem.reference[threadIdx.x] = __ldcg(&record.header->reference[threadIdx.x]);
    __syncthreads();

    HeadSums<kDim, kHeadTiles> sums = {};
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (pool_slice < 0) {
        float weight_sum[kHeadTiles];
        const float value_scale =
            params.cache.value_scale ? params.cache.value_scale[item.kv_head] : 1.0f;
        add_values<T>(sums, weight_sum, smem, cache, record, group, value_scale, slice * kSliceRows,
                      rows);
#pragma unroll
        for (int n = 0; n < kHeadTiles; ++n) {
            weight_sum[n] += __shfl_xor_sync(0xffffffffu, weight_sum[n], 1);
            weight_sum[n] += __shfl_xor_sync(0xffffffffu, weight_sum[n], 2);
            if (lane % 4 == 0) smem.warp_sums[warp][8 * n + lane / 4] = weight_sum[n];
        }
    } else {
        weigh_pools(smem, record, item, group, 1 << pool_units_log2, pool_slice * kSlicePools);
        __syncthreads();
        if (params.far_field)
            add_pools<T>(sums, smem, cache, group, pool_slice * kSlicePools, item.span.visible);
        for (int h = 0; h < group; ++h) {
            float sum = smem.far_weight[32 * warp + lane][h];
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (lane == 0) smem.warp_sums[warp][h] = sum;
        }
    }
    store_partial(sums, accumulators, record.partial + int64_t{slice} * group * kDim, group);
    if (static_cast<int>(threadIdx.x) < group) {
        float sum = 0.0f;
        for (int w = 0; w < kAttendWarps; ++w) sum += smem.warp_sums[w][threadIdx.x];
        record.weight_sums[slice * group + threadIdx.x] = sum;
    }
    if (is_last_cta(&record.header->attended, static_cast<uint32_t>(row_slices + pool_slices),
                    &smem.flag))
        combine<T, kDim>(smem, params, item, record, sizes, row_slices, pool_slices);
}

}  // namespace condensate::kernels::decode
