// Dense attention of a few queries over a cache: a CTA takes a split of the keys of one (sequence,
// KV head) for up to kRows rows, heads of the group by queries. Every warp has all those rows and
// keys of its own, so that no warp waits for another before the split's end.
#pragma once

#include "device/softmax.h"
#include "kernels/decode/dense/key_tiles.h"
#include "kernels/decode/dense/products.h"
#include "ptx/grid.h"

namespace condensate::kernels::decode {

// Raw scores -> tanh of what they are in units of the cap.
template <int kMTiles>
__device__ __forceinline__ void cap_scores(float (&s)[kMTiles][2][4], float per_cap) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float exp_2x =
                    ptx::exp2_approx(s[m][n][e] * (2.0f * device::kLog2E * per_cap));
                s[m][n][e] = 1.0f - 2.0f * ptx::rcp_approx(exp_2x + 1.0f);
            }
}

// Drops the keys that a row does not see. `last` is the key that query 0 sees last, counted from
// the tile's first.
template <int kMTiles>
__device__ __forceinline__ void mask_scores(float (&s)[kMTiles][2][4], int last, int first_row,
                                            int query_len) {
    const int lane_row = (threadIdx.x & 31) / 4, lane_key = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * m + 8 * half + lane_row;
            const int row_last = last + row % query_len;
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (lane_key + 8 * n + e > row_last) s[m][n][2 * half + e] = -INFINITY;
        }
}

// Adds up the warps' rows, and writes them to the workspace.
template <class Traits>
__device__ __forceinline__ void store_partial(typename Traits::Smem& smem,
                                              const OutTiles<Traits>& out,
                                              const device::OnlineSoftmax<Traits::kMTiles>& softmax,
                                              const DecodeParams& params,
                                              const Partials& partials) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    float* out_smem = smem.warp[warp].out;
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + 8 * half + lane / 4;
#pragma unroll
            for (int n = 0; n < Traits::kDTiles; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    out_smem[row * Traits::kOutPitch + out_channel<Traits>(n, e)] =
                        out[m][n][2 * half + e];
            if ((lane & 3) == 0) {
                smem.reference[warp][row] = softmax.reference[m][half];
                smem.sum[warp][row] = softmax.row_sum[m][half];
            }
        }
    }
    __syncthreads();  // all warps' rows are there

    constexpr int kQuads = Traits::kDim / 4;
    const WorkItem item = smem.work.item;
    const int rows = min(partials.rows - item.first_row, Traits::kRows);
    const int64_t flat_head = item.batch * params.kv_heads + item.kv_head;
    for (int i = threadIdx.x; i < rows * kQuads; i += Traits::kThreads) {
        const int row = i / kQuads, quad = i % kQuads;
        float reference = -INFINITY, sum = 0.0f;
        float4 total = {};
#pragma unroll
        for (int w = 0; w < Traits::kWarps; ++w)
            reference = fmaxf(reference, smem.reference[w][row]);
#pragma unroll
        for (int w = 0; w < Traits::kWarps; ++w) {
            const float weight =
                ptx::exp2_approx(smem.reference[w][row] - device::finite_reference(reference));
            const float4 part = *reinterpret_cast<const float4*>(
                smem.warp[w].out + row * Traits::kOutPitch + 4 * quad);
            sum = fmaf(weight, smem.sum[w][row], sum);
            total.x = fmaf(weight, part.x, total.x);
            total.y = fmaf(weight, part.y, total.y);
            total.z = fmaf(weight, part.z, total.z);
            total.w = fmaf(weight, part.w, total.w);
        }
        const int64_t flat = partials.row(flat_head, item.split, item.first_row + row);
        reinterpret_cast<float4*>(partials.out)[flat * kQuads + quad] = total;
        if (quad == 0) partials.weight[flat] = make_float2(reference, sum);
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    decode_dense_kernel(const __grid_constant__ DecodeParams params,
                        const __grid_constant__ Partials partials,
                        const __grid_constant__ int row_tiles, uint32_t* error_word) {
    extern __shared__ __align__(128) char smem_bytes[];
    auto& smem = *reinterpret_cast<typename Traits::Smem*>(smem_bytes);
    const int query_len = static_cast<int>(params.query_len);
    const int warp = threadIdx.x / 32;
    ptx::launch_dependent_grids();  // the combination, which waits for all of this
    if (warp == 0) smem.work.start(row_tiles, Traits::kRows);
    while (true) {
        __syncthreads();  // nobody reads the last item any more, nor its rows
        if (warp == 0) smem.work.step(params, error_word);
        __syncthreads();  // the item is there
        const WorkItem item = smem.work.item;
        if (item.begin < 0) break;
        KeyTiles<Traits> tiles(params.cache, item, smem.warp[warp].stage);
        const int count = tiles.count();
#pragma unroll
        for (int n = 0; n < Traits::kStages - 1; ++n) {
            if (n < count) tiles.load(n, error_word);
            ptx::cp_async_commit();
        }

        QueryTiles<Traits> q;
        load_queries<Traits>(q, [&](int tile_row) -> const uint16_t* {
            const int row = item.first_row + tile_row;
            if (row >= partials.rows) return nullptr;
            const int64_t head = item.kv_head * params.group() + row / query_len;
            return static_cast<const uint16_t*>(params.query.data) +
                   item.batch * params.query.stride_batch + head * params.query.stride_head +
                   row % query_len * params.query.stride_seq;
        });
        RowScales<Traits> row_scales;
        if constexpr (Traits::kFloat8)
            to_half<Traits>(q, params.dtype == DType::kFloat16, row_scales);
        float scale = params.scale;
        if (params.cache.key_scale) scale *= params.cache.key_scale[item.kv_head];
        const float scale_log2 =
            params.softcap > 0.0f ? params.softcap * device::kLog2E : device::exponent_scale(scale);

        OutTiles<Traits> out = {};
        device::OnlineSoftmax<Traits::kMTiles> softmax;
        for (int n = 0; n < count; ++n) {
            ptx::cp_async_wait<Traits::kStages - 2>();
            __syncwarp();  // tile n has landed; no lane reads the one before any more
            if (n + Traits::kStages - 1 < count) tiles.load(n + Traits::kStages - 1, error_word);
            ptx::cp_async_commit();

            ScoreTiles<Traits> s;
            score_keys<Traits>(s, q, tiles.k_smem(n));
            if constexpr (Traits::kFloat8) device::scale_rows(s, row_scales);
            if (params.softcap > 0.0f) {
                cap_scores(s, scale / params.softcap);
            } else if (scale < 0.0f) {
                device::negate(s);
            }
            const int last = item.length - query_len - tiles.first_key(n);
            if (!tiles.exists(n)) {
                mask_scores(s, -Traits::kTileKeys - query_len, 0, query_len);
            } else if (last < Traits::kTileKeys - 1) {
                mask_scores(s, last, item.first_row, query_len);
            }
            float rescale[Traits::kMTiles][2];
            if (softmax.raise(s, scale_log2, rescale)) device::scale_rows(out, rescale);
            softmax.weigh(s, scale_log2);
            add_values<Traits>(out, s, tiles.v_smem(n));
        }
        ptx::cp_async_wait<0>();
        __syncwarp();  // nothing is on its way to the stages, which the rows replace
        softmax.reduce_sums();
        store_partial<Traits>(smem, out, softmax, params, partials);
    }
}

}  // namespace condensate::kernels::decode
