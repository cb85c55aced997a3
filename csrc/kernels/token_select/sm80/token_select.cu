// Exact top-k of every row in O(n) memory: radix selection that recomputes the scores (mma.sync)
// for each of four digits, and once more for the index of the last selected tie where it matters.
#include "kernels/launch.h"
#include "kernels/token_select/common/radix.h"
#include "kernels/token_select/common/sweep_check.h"
#include "kernels/token_select/sm80/sweep_lse.h"

namespace condensate::kernels {
namespace {

template <int kDim>
struct alignas(128) TokenSelectSmem {
    uint8_t stages[SweepShape<kDim>::kStages * SweepShape<kDim>::kStageBytes];
    uint32_t histogram[kSweepRows * kHistogramStride];
    SweepRows rows;
    RadixRow radix[kSweepRows];
    union {  // the first is done with before the second is begun
        LsePart lse_parts[kSweepRows][kSweepWarpsN];
        uint32_t equal_bits[kSweepRows][kSweepWarpsN];  // bit i: key i of the warp's keys is a tie
    };
};

// A thread's rows: bounds of their candidates, and the prefix that the current pass refines.
struct LaneRows {
    CandidateBounds bounds[kSweepMTiles][2];
    uint32_t prefix[kSweepMTiles][2];
    int32_t anchors;
    int32_t common_end;  // keys [anchors, common_end) are candidates of all rows of the warp
};

template <class Smem>
__device__ void load_bounds(LaneRows& rows, const Smem& smem, const RowGroup& cta,
                            const Problem& problem) {
    SweepLane lane;
    rows.anchors = cta.anchor_keys(problem);
    rows.common_end = INT_MAX;
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = lane.row(m, half);
            rows.bounds[m][half] =
                candidate_bounds(cta, problem, smem.rows.query[row], smem.rows.visible_end[row]);
            rows.common_end = min(rows.common_end, rows.bounds[m][half].low_end);
        }
    }
    rows.common_end = __reduce_min_sync(0xffffffffu, rows.common_end);
}

// Counts the digits of all candidates that share their row's prefix.
template <int kDim, bool kMasked>
__device__ __forceinline__ void count_digits(uint32_t* histogram_smem,
                                             const SweepScores<kDim>& scores, const LaneRows& rows,
                                             float scale, int32_t first_key, int digit_shift) {
    SweepLane lane;
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t* bins = histogram_smem + lane.row(m, half) * kHistogramStride;
#pragma unroll
            for (int n = 0; n < SweepScores<kDim>::kNTiles; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    float score = __fmul_rn(scores.acc[m][n][e], scale);
                    uint32_t leading = ordered_key(score) >> digit_shift;
                    bool counts = score == score && leading >> kRadixBits == rows.prefix[m][half];
                    if (kMasked) {
                        counts = counts && rows.bounds[m][half].contains(
                                               rows.anchors, first_key + lane.warp_key(n, e));
                    }
                    if (counts) atomicAdd(bins + leading % kRadixBins, 1u);
                }
            }
        }
    }
}

// Narrows all rows by the digit just counted; returns whether any row goes on.
template <class Smem>
__device__ bool narrow_rows(Smem& smem, int pass) {
    constexpr int kWarpRows = kSweepRows / (kSweepThreads / 32);
    int warp = static_cast<int>(threadIdx.x) / 32;
    bool active = false;
    for (int row = warp * kWarpRows; row < (warp + 1) * kWarpRows; ++row) {
        RadixRow next = narrow_row(smem.radix[row], smem.histogram + row * kHistogramStride, pass);
        __syncwarp();  // every lane has read the row that lane 0 now replaces
        if (threadIdx.x % 32 == 0) smem.radix[row] = next;
        active |= next.prefix != kNoPrefix;
    }
    return __syncthreads_or(active) != 0;
}

// Finds the index of the tie that fills the budget, tile by tile; thread r searches row r.
struct TieSearch {
    uint32_t wanted;  // ties that are selected
    uint32_t seen = 0;
    int32_t tie_index = INT_MAX;

    __device__ void look(uint32_t bits, int32_t first_key) {
        uint32_t count = static_cast<uint32_t>(__popc(bits));
        if (seen < wanted && seen + count >= wanted) {
            for (uint32_t i = seen + 1; i < wanted; ++i) bits &= bits - 1;
            tie_index = first_key + __ffs(static_cast<int>(bits)) - 1;
        }
        seen += count;
    }
};

// Marks in shared memory which keys of the tile equal their row's threshold.
template <int kDim>
__device__ __forceinline__ void mark_ties(uint32_t (&equal_bits)[kSweepRows][kSweepWarpsN],
                                          const SweepScores<kDim>& scores, const LaneRows& rows,
                                          const float (&threshold)[kSweepMTiles][2], float scale,
                                          int32_t first_key) {
    SweepLane lane;
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t bits = 0;
#pragma unroll
            for (int n = 0; n < SweepScores<kDim>::kNTiles; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    int key = lane.warp_key(n, e);
                    bool equal = __fmul_rn(scores.acc[m][n][e], scale) == threshold[m][half];
                    bool tie =
                        equal && rows.bounds[m][half].contains(rows.anchors, first_key + key);
                    bits |= tie ? 1u << key : 0u;
                }
            }
            bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
            bits |= __shfl_xor_sync(0xffffffffu, bits, 2);
            if (lane.lane % 4 == 0) equal_bits[lane.row(m, half)][lane.warp_n] = bits;
        }
    }
}

// Everything of a thread that stays the same from pass to pass.
template <class T, int kDim>
struct TokenSelectThread {
    using Smem = TokenSelectSmem<kDim>;
    Smem& smem;
    uint32_t stages_smem;
    RowGroup cta;
    SweepKeys<T> keys;
    SweepQueries<kDim> queries;
    LaneRows rows;
    int32_t candidates_end;  // no row of the CTA has a candidate at or past it

    __device__ __forceinline__ TokenSelectThread(const TokenSelectParams& params, Smem& shared)
        : smem(shared),
          stages_smem(ptx::smem_address(shared.stages)),
          cta(row_group_of_cta<kSweepRows>(params.problem, params.problem.query_len)),
          keys(params.key, cta, params.problem) {
        const Problem& problem = params.problem;
        fill_row_table(smem.rows, cta, problem, [](int64_t slot) { return slot; });
        load_sweep_queries<T, kDim>(queries, stages_smem, smem.rows, cta, params.query,
                                    static_cast<int>(problem.head_dim));
        load_bounds(rows, smem, cta, problem);
        candidates_end = cta.candidates_end(problem, smem.rows.last_visible_end);
    }
};

// No digit is known and all of the budget remains; the histograms are empty.
template <int kDim>
__device__ __forceinline__ void start_rows(TokenSelectSmem<kDim>& smem, int64_t topk) {
    int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < kSweepRows * kHistogramStride; i += kSweepThreads) {
        smem.histogram[i] = 0;
    }
    if (thread < kSweepRows) {
        smem.radix[thread] = {topk > 0 ? 0 : kNoPrefix,
                              static_cast<uint32_t>(min_i64(topk, INT_MAX)), 0};
    }
    __syncthreads();
}

// Refines all rows by one digit and returns whether any row goes on. With lse_full, also sweeps the
// keys that cannot be selected and writes the LSE of all visible ones.
template <class T, int kDim>
__device__ __forceinline__ bool run_pass(TokenSelectThread<T, kDim>& thread, const Problem& problem,
                                         int pass, float* lse_full) {
    auto& smem = thread.smem;
    LaneRows& rows = thread.rows;
    SweepLane lane;
    int32_t visible_end[kSweepMTiles][2];
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows.prefix[m][half] = smem.radix[lane.row(m, half)].prefix;
            visible_end[m][half] = rows.bounds[m][half].end;
        }
    }
    device::OnlineSoftmax<kSweepMTiles> softmax;
    int digit_shift = 32 - kRadixBits * (pass + 1);
    int32_t begin = lse_full ? 0 : rows.anchors;
    int32_t end = lse_full ? smem.rows.last_visible_end : thread.candidates_end;
    sweep_keys<T, kDim>(thread.queries, thread.stages_smem, thread.keys, begin, end,
                        [&](SweepScores<kDim>& scores, int32_t first_key) {
                            int32_t end_key = first_key + SweepShape<kDim>::kWarpKeys;
                            if (first_key >= rows.anchors && end_key <= rows.common_end) {
                                count_digits<kDim, false>(smem.histogram, scores, rows,
                                                          problem.scale, first_key, digit_shift);
                            } else {
                                count_digits<kDim, true>(smem.histogram, scores, rows,
                                                         problem.scale, first_key, digit_shift);
                            }
                            if (lse_full)
                                add_to_lse(softmax, scores, problem.scale, visible_end, first_key);
                        });
    bool active = narrow_rows(smem, pass);
    if (lse_full) {
        float lse = finish_lse(softmax, smem.lse_parts);
        int row = static_cast<int>(threadIdx.x);
        if (row < kSweepRows && thread.cta.exists(row)) {
            lse_full[thread.cta.flat_row(problem, row, thread.cta.slot(row))] = lse;
        }
        __syncthreads();  // the parts have been read; their memory serves find_ties next
    }
    return active;
}

// The tie index of row threadIdx.x. A further sweep, unless every row takes all of its ties.
template <class T, int kDim>
__device__ __forceinline__ int32_t find_ties(TokenSelectThread<T, kDim>& thread,
                                             const Problem& problem) {
    auto& smem = thread.smem;
    int own_row = static_cast<int>(threadIdx.x);
    TieSearch search = {0};
    if (own_row < kSweepRows) {
        RadixRow row = smem.radix[own_row];
        if (row.prefix != kNoPrefix && row.equal > row.remaining) search.wanted = row.remaining;
    }
    if (__syncthreads_or(search.wanted > 0) == 0) return INT_MAX;

    SweepLane lane;
    float threshold[kSweepMTiles][2];
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t prefix = smem.radix[lane.row(m, half)].prefix;
            threshold[m][half] = prefix == kNoPrefix ? NAN : from_ordered_key(prefix);
        }
    }
    constexpr int kWarpKeys = SweepShape<kDim>::kWarpKeys;
    sweep_keys<T, kDim>(thread.queries, thread.stages_smem, thread.keys, thread.rows.anchors,
                        thread.candidates_end, [&](SweepScores<kDim>& scores, int32_t first_key) {
                            mark_ties<kDim>(smem.equal_bits, scores, thread.rows, threshold,
                                            problem.scale, first_key);
                            __syncthreads();  // the sweep's own barrier keeps the next tile's marks
                                              // from these reads
                            if (own_row >= kSweepRows) return;
                            int32_t tile_key = first_key - lane.warp_n * kWarpKeys;
#pragma unroll
                            for (int n = 0; n < kSweepWarpsN; ++n) {
                                search.look(smem.equal_bits[own_row][n], tile_key + n * kWarpKeys);
                            }
                        });
    return search.tie_index;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kSweepThreads, 2)
    token_select_sm80_kernel(const __grid_constant__ TokenSelectParams params) {
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<TokenSelectSmem<kDim>*>(smem_bytes);
    const Problem& problem = params.problem;
    TokenSelectThread<T, kDim> thread(params, smem);

    start_rows(smem, params.topk);
    bool active = params.topk > 0;
    for (int pass = 0; pass < kRadixPasses; ++pass) {
        float* lse_full = pass == 0 ? params.lse_full : nullptr;
        if (active || lse_full) active = run_pass(thread, problem, pass, lse_full);
    }
    int32_t tie_index = active ? find_ties(thread, problem) : INT_MAX;

    int row = static_cast<int>(threadIdx.x);
    if (row >= kSweepRows || !thread.cta.exists(row)) return;
    uint32_t prefix = smem.radix[row].prefix;
    float threshold = prefix == kNoPrefix ? -INFINITY : from_ordered_key(prefix);
    if (params.topk == 0) {  // nothing is selected
        threshold = INFINITY;
        tie_index = -1;
    }
    int64_t flat = thread.cta.flat_row(problem, row, thread.cta.slot(row));
    params.threshold[flat] = threshold;
    params.tie_index[flat] = tie_index;
}

template <class T, int kDim>
Status launch_token_select(const TokenSelectParams& params, const LaunchContext& context) {
    static_assert(sizeof(TokenSelectSmem<kDim>) <= 99 * 1024,
                  "every sm_80+ device offers 99 KB to a CTA");
    return launch(token_select_sm80_kernel<T, kDim>, "token_select_sm80",
                  {row_groups<kSweepRows>(params.problem, params.problem.query_len)}, kSweepThreads,
                  sizeof(TokenSelectSmem<kDim>), context, params);
}

}  // namespace

Status token_select_sm80(const TokenSelectParams& params, const LaunchContext& context) {
    Status status = check_sweep("token_select_sm80", params.problem, params.query, params.key);
    if (!status.ok()) return status;
    TokenSelectParams bounded = params;
    bounded.problem = bound_window(params.problem);
    return with_sweep_shape(params.problem, [&](auto type, auto dim) {
        return launch_token_select<typename decltype(type)::type, decltype(dim)::value>(bounded,
                                                                                        context);
    });
}

}  // namespace condensate::kernels
