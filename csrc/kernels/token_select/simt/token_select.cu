// Exact token selection on CUDA cores.
#include "device/simt/key_sweep.h"
#include "kernels/launch.h"
#include "kernels/token_select/common/radix.h"
#include "kernels/token_select/common/sweep_check.h"

namespace condensate::kernels {
namespace simt {
namespace {

struct TokenSelectSmem {
    SweepSmem sweep;
    uint32_t histogram[kCtaRows * kHistogramStride];
};

// Per row of this warp; the same on all lanes.
struct WarpRows {
    RadixRow radix[kWarpRows];
    CandidateBounds bounds[kWarpRows];
    int32_t anchors;
};

__device__ __forceinline__ bool is_active(const WarpRows& rows) {
    bool active = false;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) active |= rows.radix[r].prefix != kNoPrefix;
    return active;
}

// Counts one digit of all candidates that share their row's prefix and narrows the rows by it. With
// lse_full, also sweeps the keys that cannot be selected and writes the LSE of all visible ones.
template <class T>
__device__ void run_pass(TokenSelectSmem& smem, const TokenSelectParams& params,
                         const RowGroup& cta, WarpRows& rows, int pass, float* lse_full) {
    Lane lane;
    int digit_shift = 32 - kRadixBits * (pass + 1);
    int32_t last_visible_end = smem.sweep.rows.last_visible_end;
    LaneSum sums[kWarpRows];
    sweep_keys<T>(
        smem.sweep, cta, params.key, params.problem, lse_full ? 0 : rows.anchors,
        lse_full ? last_visible_end : cta.candidates_end(params.problem, last_visible_end),
        [&](const float (&score)[kWarpRows], int32_t key) {
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                uint32_t leading = ordered_key(score[r]) >> digit_shift;
                if (score[r] == score[r] && leading >> kRadixBits == rows.radix[r].prefix &&
                    rows.bounds[r].contains(rows.anchors, key)) {
                    atomicAdd(
                        smem.histogram + lane.row(r) * kHistogramStride + leading % kRadixBins, 1u);
                }
                if (lse_full && key < rows.bounds[r].end) sums[r].add(score[r]);
            }
        });
    __syncwarp();  // the warp's histograms are complete
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        int row = lane.row(r);
        rows.radix[r] = narrow_row(rows.radix[r], smem.histogram + row * kHistogramStride, pass);
        if (lse_full == nullptr) continue;
        float lse = sums[r].over_warp().lse();
        if (lane.lane == 0 && cta.exists(row)) {
            lse_full[cta.flat_row(params.problem, row, cta.slot(row))] = lse;
        }
    }
    __syncwarp();  // the histograms are cleared
}

// The index of the tie that fills the budget of each row; INT_MAX where all ties are taken.
template <class T>
__device__ void find_ties(TokenSelectSmem& smem, const TokenSelectParams& params,
                          const RowGroup& cta, const WarpRows& rows,
                          int32_t (&tie_index)[kWarpRows]) {
    uint32_t wanted[kWarpRows], seen[kWarpRows] = {};
    bool any = false;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        const RadixRow& row = rows.radix[r];
        wanted[r] = row.prefix != kNoPrefix && row.equal > row.remaining ? row.remaining : 0;
        tie_index[r] = INT_MAX;
        any |= wanted[r] > 0;
    }
    if (__syncthreads_or(any) == 0) return;
    sweep_keys<T>(smem.sweep, cta, params.key, params.problem, rows.anchors,
                  cta.candidates_end(params.problem, smem.sweep.rows.last_visible_end),
                  [&](const float (&score)[kWarpRows], int32_t key) {
#pragma unroll
                      for (int r = 0; r < kWarpRows; ++r) {
                          bool equal = score[r] == from_ordered_key(rows.radix[r].prefix) &&
                                       rows.bounds[r].contains(rows.anchors, key);
                          uint32_t bits = __ballot_sync(0xffffffffu, equal);
                          uint32_t through =
                              seen[r] + __popc(bits & (0xffffffffu >> (31 - key % 32)));
                          uint32_t last = __ballot_sync(0xffffffffu, equal && through == wanted[r]);
                          if (last != 0)
                              tie_index[r] = key - key % 32 + __ffs(static_cast<int>(last)) - 1;
                          seen[r] += __popc(bits);
                      }
                  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    token_select_simt_kernel(const __grid_constant__ TokenSelectParams params) {
    extern __shared__ __align__(16) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<TokenSelectSmem*>(smem_bytes);
    const Problem& problem = params.problem;
    RowGroup cta = row_group_of_cta<kCtaRows>(problem, problem.query_len);
    fill_row_table(smem.sweep.rows, cta, problem, [](int64_t slot) { return slot; });
    load_queries<T>(smem.sweep, cta, params.query, static_cast<int>(problem.head_dim));
    for (int i = static_cast<int>(threadIdx.x); i < kCtaRows * kHistogramStride; i += kThreads) {
        smem.histogram[i] = 0;
    }
    __syncthreads();

    Lane lane;
    WarpRows rows;
    rows.anchors = cta.anchor_keys(problem);
    uint32_t topk = static_cast<uint32_t>(min_i64(params.topk, INT_MAX));
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        int row = lane.row(r);
        rows.bounds[r] = candidate_bounds(cta, problem, smem.sweep.rows.query[row],
                                          smem.sweep.rows.visible_end[row]);
        rows.radix[r] = {topk > 0 ? 0 : kNoPrefix, topk, 0};
    }
    for (int pass = 0; pass < kRadixPasses; ++pass) {
        float* lse_full = pass == 0 ? params.lse_full : nullptr;
        if (__syncthreads_or(is_active(rows)) || lse_full) {
            run_pass<T>(smem, params, cta, rows, pass, lse_full);
        }
    }
    int32_t tie_index[kWarpRows];
    find_ties<T>(smem, params, cta, rows, tie_index);

#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        int row = lane.row(r);
        if (lane.lane != 0 || !cta.exists(row)) continue;
        uint32_t prefix = rows.radix[r].prefix;
        float threshold = prefix == kNoPrefix ? -INFINITY : from_ordered_key(prefix);
        int64_t flat = cta.flat_row(problem, row, cta.slot(row));
        params.threshold[flat] =
            topk == 0 ? INFINITY : threshold;  // above all: nothing is selected
        params.tie_index[flat] = topk == 0 ? -1 : tie_index[r];
    }
}

}  // namespace
}  // namespace simt

Status token_select_simt(const TokenSelectParams& params, const LaunchContext& context) {
    Status status = check_key_count("token_select_simt", params.problem);
    if (!status.ok()) return status;
    TokenSelectParams bounded = params;
    bounded.problem = bound_window(params.problem);
    return with_element_type(params.problem.dtype, [&](auto tag) {
        return launch(simt::token_select_simt_kernel<typename decltype(tag)::type>,
                      "token_select_simt",
                      {row_groups<simt::kCtaRows>(params.problem, params.problem.query_len)},
                      simt::kThreads, sizeof(simt::TokenSelectSmem), context, bounded);
    });
}

}  // namespace condensate::kernels
