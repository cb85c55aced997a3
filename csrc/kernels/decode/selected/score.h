// Exact scores of the keys in an item's slots, from memory straight into registers.
#pragma once

#include "device/element.h"
#include "kernels/decode/common/cache_elements.h"
#include "kernels/decode/common/cache_view.h"
#include "kernels/decode/selected/given.h"
#include "kernels/decode/selected/scan.h"
#include "ptx/matrix.h"

namespace condensate::kernels::decode {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kScoreSteps = kSliceSlots / 16 / kScoreWarps;  // of 16 slots, of a warp

template <class T, int kDim>
struct ScoreSmem {
    static constexpr int kStride = kDim + 8;  // rows start in different banks
    T query[kMaxDecodeGroup][kStride];
    ScoreSums sums[kScoreWarps][kMaxDecodeGroup];
    uint32_t largest;  // of the caller's tokens before a slice
};

// The group's queries to shared memory; heads past it are 0.
template <class T, int kDim>
__device__ void load_query(ScoreSmem<T, kDim>& smem, const DecodeParams& params, const Item& item) {
    constexpr int kVectors = kDim / 8;
    const int group = params.group();
    const T* query = static_cast<const T*>(params.query.data) +
                     item.sequence * params.query.stride_batch +
                     static_cast<int64_t>(item.kv_head) * group * params.query.stride_head +
                     item.query * params.query.stride_seq;
    for (int i = static_cast<int>(threadIdx.x); i < kMaxDecodeGroup * kVectors;
         i += kScoreThreads) {
        const int head = i / kVectors, channel = 8 * (i % kVectors);
        const uint4 x = head < group ? __ldg(reinterpret_cast<const uint4*>(
                                           query + head * params.query.stride_head + channel))
                                     : uint4{0, 0, 0, 0};
        *reinterpret_cast<uint4*>(&smem.query[head][channel]) = x;
    }
}

// Scores a slice: 16 slots a step of a warp, the lane's 8 channels of every 32 of the keys in slots
// lane / 4 and lane / 4 + 8. Tells the sums of the slice.
template <class T, int kDim, int kHeadTiles, class CacheT>
__device__ void score_slice(ScoreSmem<T, kDim>& smem, const CacheView<CacheT>& cache,
                            const DecodeParams& params, const Item& item, const SlotRuns& runs,
                            const GivenTokens& given, const Record& record, int slice,
                            uint32_t* error_word) {
    constexpr int kSteps = kDim / 32;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int group = params.group(), t = lane % 4;
    const int begin = slice * kSliceSlots + 16 * kScoreSteps * warp;
    int32_t token[kScoreSteps][2];
    const CacheT* row[kScoreSteps][2];
    bool missing = false;  // a page that the sequence needs
    // Each of these three loops is loads, or arithmetic, without a branch: latencies overlap.
#pragma unroll
    for (int step = 0; step < kScoreSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int slot = begin + 16 * step + lane / 4 + 8 * half;
            token[step][half] = given.given()
                                    ? given.key_of_slot(item.span, runs, slot, error_word)
                                    : runs.key(item.span, slot, record.shortlist, item.selects);
        }
#pragma unroll
    for (int step = 0; step < kScoreSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool exists;
            const int32_t key = token[step][half];
            row[step][half] = cache.key_row(cache.page_or_any(key, &exists), max(key, 0)) + 8 * t;
            missing |= key >= 0 && !exists;
            token[step][half] = exists ? key : -1;
        }
    if (missing) atomicOr(error_word, kErrorBlockTable);
    float acc[kScoreSteps][kHeadTiles][4] = {};
    // As many loads under way as registers hold.
    constexpr int kAtOnce = kSteps < 4 ? kSteps : 4;
#pragma unroll
    for (int s0 = 0; s0 < kSteps; s0 += kAtOnce) {
        Loaded8<CacheT> keys[kScoreSteps][2][kAtOnce];
#pragma unroll
        for (int step = 0; step < kScoreSteps; ++step)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int s = 0; s < kAtOnce; ++s)
                    if (s0 + s < kSteps)
                        keys[step][half][s] = load_8(row[step][half] + 32 * (s0 + s));
        if (s0 == 0) __syncthreads();  // the queries are there
#pragma unroll
        for (int s = 0; s < kAtOnce; ++s) {
            if (s0 + s >= kSteps) break;
#pragma unroll
            for (int n = 0; n < kHeadTiles; ++n) {
                const uint4 q = *reinterpret_cast<const uint4*>(
                    &smem.query[8 * n + lane / 4][32 * (s0 + s) + 8 * t]);
#pragma unroll
                for (int step = 0; step < kScoreSteps; ++step) {
                    const uint4 lo = elements_of<T>(keys[step][0][s]);
                    const uint4 hi = elements_of<T>(keys[step][1][s]);
                    const uint32_t even[4] = {lo.x, hi.x, lo.y, hi.y};
                    ptx::mma_m16n8k16<T>(acc[step][n], even, q.x, q.y);
                    const uint32_t odd[4] = {lo.z, hi.z, lo.w, hi.w};
                    ptx::mma_m16n8k16<T>(acc[step][n], odd, q.z, q.w);
                }
            }
        }
    }
    const float score_scale =
        params.scale * (params.cache.key_scale ? params.cache.key_scale[item.kv_head] : 1.0f);
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int head = 8 * n + 2 * t + c;
            float largest = -INFINITY, selectable = -INFINITY, sum = 0.0f;
#pragma unroll
            for (int step = 0; step < kScoreSteps; ++step)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int slot = begin + 16 * step + lane / 4 + 8 * half;
                    float& score = acc[step][n][c + 2 * half];
                    score = token[step][half] >= 0
                                ? capped_log2(score * score_scale, params.softcap)
                                : -INFINITY;
                    if (slot < runs.slots() && head < group)
                        record.key_scores[slot * group + head] = score;
                    if (n == 0 && c == 0 && t == 0 && slot < runs.slots())
                        record.slot_keys[slot] = token[step][half];
                    largest = fmaxf(largest, score);
                    if (item.span.is_candidate(token[step][half]))
                        selectable = fmaxf(selectable, score);
                }
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
                selectable = fmaxf(selectable, __shfl_xor_sync(0xffffffffu, selectable, offset));
            }
            const float reference = device::finite_reference(largest);
#pragma unroll
            for (int step = 0; step < kScoreSteps; ++step)
                sum += ptx::exp2_approx(acc[step][n][c] - reference) +
                       ptx::exp2_approx(acc[step][n][c + 2] - reference);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (lane < 4) smem.sums[warp][head] = {largest, sum, selectable, 0.0f};
        }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < group) {
        ScoreSums total = smem.sums[0][threadIdx.x];
        for (int w = 1; w < kScoreWarps; ++w) total = merge(total, smem.sums[w][threadIdx.x]);
        record.slot_sums[slice * group + threadIdx.x] = total;
    }
}

template <class T, class CacheT, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kScoreThreads)
    decode_score_kernel(const __grid_constant__ DecodeParams params,
                        const __grid_constant__ Sizes sizes, uint8_t* workspace,
                        uint32_t* error_word) {
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<ScoreSmem<T, kDim>*>(smem_bytes);
    const int64_t index = blockIdx.y;
    const int slice = static_cast<int>(blockIdx.x);
    const Item item(params, index, error_word);
    const Record record(workspace, sizes, index);
    GivenTokens given;
    int32_t listed_runs = 0;
    if (params.mode == DecodeMode::kGivenTokens) {
        given.read(params, item, index, error_word);
        listed_runs = (given.count + kUnitKeys - 1) / kUnitKeys;
    } else {
        listed_runs = __ldcg(&record.header->units);
    }
    const SlotRuns runs(item.span, listed_runs);
    const int slices = max((runs.slots() + kSliceSlots - 1) / kSliceSlots, 1);
    if (slice >= slices) return;
    load_query(smem, params, item);
    if (given.given())
        given.start_at(smem.largest, slice * kSliceSlots - runs.anchor_runs * kUnitKeys);
    const CacheView<CacheT> cache(params.cache, params.summaries, item.sequence, item.kv_head);
    score_slice<T, kDim, kHeadTiles>(smem, cache, params, item, runs, given, record, slice,
                                     error_word);
}

}  // namespace condensate::kernels::decode
