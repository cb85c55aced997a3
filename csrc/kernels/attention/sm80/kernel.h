// Attention over ranges and listed blocks with mma.sync: one CTA per tile (or part of a tile), four
// warps of 16 or 32 rows, K and V double-buffered by cp.async.
#pragma once

#include "condensate/kv_view.h"
#include "condensate/tile.h"
#include "device/mma_tile.h"
#include "device/pack.h"
#include "device/row_mask.h"
#include "device/softmax.h"
#include "device/tile_walk.h"
#include "kernels/attention/sm80/far_step.h"
#include "kernels/attention/sm80/steps.h"
#include "kernels/attention/sm80/traits.h"

namespace condensate::kernels::sm80 {

template <class Traits>
__device__ __forceinline__ void load_queries(typename Traits::Smem& smem,
                                             const AttentionParams& params, const Tile& tile,
                                             int first_row) {
    using T = typename Traits::T;
    constexpr int kChunks = Traits::kDim / 8;
    const T* query = static_cast<const T*>(params.query.data);
    uint32_t q_smem = ptx::smem_address(smem.q);
    for (int i = threadIdx.x; i < Traits::kRows * kChunks; i += Traits::kThreads) {
        int row = i / kChunks, chunk = i % kChunks;
        bool copy = tile.exists(first_row + row) && chunk * 8 < params.problem.head_dim;
        const T* src = query;
        if (copy)
            src += params.query.offset(tile.batch, tile.head(first_row + row),
                                       tile.query(first_row + row)) +
                   chunk * 8;
        ptx::cp_async_16(q_smem + device::tile_offset<Traits::kDim>(row, chunk), src, copy);
    }
}

// Key scores a row must exceed, or equal at an index up to `tie`, to be selected.
template <int kMTiles>
struct RowThresholds {
    float score[kMTiles][2];
    int tie[kMTiles][2];
};

template <class Traits>
__device__ __forceinline__ void load_thresholds(RowThresholds<Traits::kMTiles>& thresholds,
                                                const AttentionParams& params, const Tile& tile,
                                                int warp_first_row) {
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = warp_first_row + 16 * m + 8 * half + (threadIdx.x & 31) / 4;
            bool exists = tile.exists(row);
            int64_t flat = exists ? tile.flat_row(params.problem, row) : 0;
            thresholds.score[m][half] = exists ? params.threshold[flat] : INFINITY;
            thresholds.tie[m][half] = exists ? params.tie_index[flat] : -1;
        }
    }
}

// Drops every score outside the rows' supports.
template <class Traits>
__device__ __forceinline__ void mask_scores(float (&s)[Traits::kMTiles][Traits::kNTiles][4],
                                            const Ranges& ranges, const Step& step,
                                            const Tile& tile, int warp_first_row, float scale,
                                            const RowThresholds<Traits::kMTiles>& thresholds) {
    int lane_row = (threadIdx.x & 31) / 4, lane_key = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int64_t position = tile.position(warp_first_row + 16 * m + 8 * half + lane_row);
            uint64_t visible = device::visible_bits(ranges, position, step.key_begin) >> lane_key;
            uint64_t kept =
                step.whole ? ~0ull : device::range_bits(ranges, position, step.key_begin);
            kept = visible & (kept >> lane_key);
#pragma unroll
            for (int n = 0; n < Traits::kNTiles; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = s[m][n][2 * half + e];
                    bool keep = kept >> (8 * n + e) & 1;
                    if constexpr (Traits::kExact) {
                        int key = static_cast<int>(step.key_begin) + lane_key + 8 * n + e;
                        float scaled = score * scale, least = thresholds.score[m][half];
                        bool selected = (scaled > least) |
                                        ((scaled == least) & (key <= thresholds.tie[m][half]));
                        keep |= selected & (visible >> (8 * n + e) & 1);
                    }
                    score = keep ? score : -INFINITY;
                }
            }
        }
    }
}

// out += weights * values, with the weights rounded to the values' type.
template <class Traits>
__device__ __forceinline__ void accumulate_values(
    float (&out)[Traits::kMTiles][Traits::kDTiles][4],
    const float (&p)[Traits::kMTiles][Traits::kNTiles][4], uint32_t v_smem) {
    using T = typename Traits::T;
    uint32_t v_lane = device::row_major_lane<Traits::kDim>(v_smem, 0);
#pragma unroll
    for (int k_step = 0; k_step < Traits::kStepKeys / 16; ++k_step) {
        uint32_t a[Traits::kMTiles][4];
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m) {
            const float (&left)[4] = p[m][2 * k_step];
            const float (&right)[4] = p[m][2 * k_step + 1];
            a[m][0] = device::pack2<T>(left[0], left[1]);
            a[m][1] = device::pack2<T>(left[2], left[3]);
            a[m][2] = device::pack2<T>(right[0], right[1]);
            a[m][3] = device::pack2<T>(right[2], right[3]);
        }
#pragma unroll
        for (int pair = 0; pair < Traits::kDTiles / 2; ++pair) {
            uint32_t b[4];
            ptx::ldmatrix_x4_trans(
                b, device::chunk_pair_address<Traits::kDim>(v_lane, 16 * k_step, pair));
#pragma unroll
            for (int m = 0; m < Traits::kMTiles; ++m) {
                ptx::mma_m16n8k16<T>(out[m][2 * pair], a[m], b[0], b[1]);
                ptx::mma_m16n8k16<T>(out[m][2 * pair + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Divides by the sums and writes a warp's rows: registers -> its own rows of smem.q -> global.
template <class Traits>
__device__ __forceinline__ void store_rows(typename Traits::Smem& smem,
                                           const AttentionParams& params, const Tile& tile,
                                           int first_row, int warp_row,
                                           const float (&out)[Traits::kMTiles][Traits::kDTiles][4],
                                           const device::OnlineSoftmax<Traits::kMTiles>& softmax) {
    using T = typename Traits::T;
    constexpr int kChunks = Traits::kDim / 8;
    int lane = threadIdx.x & 31;
    char* rows_smem = reinterpret_cast<char*>(smem.q);
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = warp_row + 16 * m + 8 * half + lane / 4;
            float sum = softmax.row_sum[m][half];
            float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
            for (int n = 0; n < Traits::kDTiles; ++n) {
                uint32_t offset = device::tile_offset<Traits::kDim>(row, n) + 4 * (lane & 3);
                *reinterpret_cast<uint32_t*>(rows_smem + offset) = device::pack2<T>(
                    out[m][n][2 * half] * inverse, out[m][n][2 * half + 1] * inverse);
            }
            if (params.lse && (lane & 3) == 0 && tile.exists(first_row + row)) {
                params.lse[tile.flat_row(params.problem, first_row + row)] = softmax.lse(m, half);
            }
        }
    }
    __syncwarp();
    T* out_gmem = static_cast<T*>(params.out);
    for (int i = lane; i < Traits::kWarpRows * kChunks; i += 32) {
        int row = warp_row + i / kChunks, chunk = i % kChunks;
        if (chunk * 8 >= params.problem.head_dim || !tile.exists(first_row + row)) continue;
        int64_t flat = tile.flat_row(params.problem, first_row + row);
        *reinterpret_cast<uint4*>(out_gmem + flat * params.problem.head_dim + chunk * 8) =
            *reinterpret_cast<const uint4*>(rows_smem +
                                            device::tile_offset<Traits::kDim>(row, chunk));
    }
}

// `parts` CTAs share a tile's rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    attention_sm80_kernel(const __grid_constant__ AttentionParams params,
                          const __grid_constant__ int parts, uint32_t* error_word) {
    using T = typename Traits::T;
    extern __shared__ __align__(128) char smem_bytes[];
    auto& smem = *reinterpret_cast<typename Traits::Smem*>(smem_bytes);

    const Problem& problem = params.problem;
    const auto tile = Tile::longest_first(problem, blockIdx.x / parts);
    const int first_row = static_cast<int>(blockIdx.x % parts) * Traits::kRows;
    const int warp_row = static_cast<int>(threadIdx.x / 32) * Traits::kWarpRows;
    const Ranges ranges = tile.ranges(problem);

    RowThresholds<Traits::kMTiles> thresholds;
    if constexpr (Traits::kExact) {
        load_thresholds<Traits>(thresholds, params, tile, first_row + warp_row);
    }

    const KvView keys = KvView::of(params.key, sizeof(T), tile.batch, tile.kv_head);
    const KvView values = KvView::of(params.value, sizeof(T), tile.batch, tile.kv_head);
    auto load_step = [&](const Step& step, int stage) {
        const int64_t first = step.key_begin, valid = tile.kv_len - first;
        const int head_dim = static_cast<int>(problem.head_dim);
        device::copy_tile_async<T, Traits::kStepKeys, Traits::kDim, Traits::kThreads>(
            ptx::smem_address(smem.k[stage]), keys, first, valid, head_dim);
        device::copy_tile_async<T, Traits::kStepKeys, Traits::kDim, Traits::kThreads>(
            ptx::smem_address(smem.v[stage]), values, first, valid, head_dim);
    };

    float out[Traits::kMTiles][Traits::kDTiles][4] = {};
    device::OnlineSoftmax<Traits::kMTiles> softmax;
    const float scale_log2 = device::exponent_scale(problem.scale);
    auto score = [&](float (&scores)[Traits::kMTiles][Traits::kNTiles][4], int stage) {
        device::score_tile<T, Traits::kDim>(scores, ptx::smem_address(smem.q), warp_row,
                                            ptx::smem_address(smem.k[stage]));
    };
    OmittedSteps<Traits> omitted;
    // `pools`: they are scores of pooled rows.
    auto accumulate = [&](float (&scores)[Traits::kMTiles][Traits::kNTiles][4], int stage,
                          bool pools, bool sampled) {
        float rescale[Traits::kMTiles][2], weights[1][Traits::kMTiles][2];
        if (sampled) omitted.add_scores(scores);
        if (softmax.raise(scores, scale_log2, rescale)) {
            device::scale_rows(out, rescale);
            if constexpr (Traits::kEstimates) omitted.rescale(rescale);
        }
        softmax.template weigh<Traits::kNTiles>(scores, scale_log2, weights);
        if (Traits::kEstimates && pools) omitted.add_pools(weights[0]);
        if (sampled) omitted.add_weights(weights[0], softmax, scale_log2);
        accumulate_values<Traits>(out, scores, ptx::smem_address(smem.v[stage]));
    };

    load_queries<Traits>(smem, params, tile, first_row);
    if constexpr (Traits::kFar)
        for_far_steps<Traits>(smem, params, blockIdx.x / parts, [&](int stage, const float* bias) {
            float scores[Traits::kMTiles][Traits::kNTiles][4];
            score(scores, stage);
            if (problem.scale < 0.0f) device::negate(scores);
            add_far_bias(scores, bias);
            accumulate(scores, stage, true, false);
        });

    StepWalk<Traits> walk(params, tile);
    Step step = walk.next();
    if (step.key_begin >= 0) load_step(step, 0);
    ptx::cp_async_commit();

    for (int stage = 0; step.key_begin >= 0; stage ^= 1) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // this step's K and V have landed; nobody reads the other stage any more
        Step next = walk.next();
        if (next.key_begin >= 0) load_step(next, stage ^ 1);
        ptx::cp_async_commit();

        float scores[Traits::kMTiles][Traits::kNTiles][4];
        score(scores, stage);
        if (step.partial) {
            mask_scores<Traits>(scores, ranges, step, tile, first_row + warp_row, problem.scale,
                                thresholds);
        }
        if (problem.scale < 0.0f) device::negate(scores);
        accumulate(scores, stage, false, Traits::kEstimates && step.sampled);
        step = next;
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // a tile without steps has not waited for its queries, which `out` replaces
    softmax.reduce_sums();
    if (Traits::kEstimates && params.omitted_mass_estimate)
        omitted.store(params, tile, first_row + warp_row, softmax);
    store_rows<Traits>(smem, params, tile, first_row, warp_row, out, softmax);
    if (walk.errors() && threadIdx.x == 0) atomicOr(error_word, walk.errors());
}

}  // namespace condensate::kernels::sm80
