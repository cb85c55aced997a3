// A CTA scores 64 query rows against every key of a range: what the kernels that look at all keys
// share. Queries stay in registers, keys pass through two stages of shared memory, and each tile
// of scores goes to a body. The products and their order are those of device/mma_tile.h, so a
// score is the same float as in the attention kernel; only the source of the A operand differs.
#pragma once

#include <cstdint>

#include "condensate/params.h"
#include "device/smem_tile.h"
#include "ptx/cp_async.h"
#include "ptx/matrix.h"

namespace condensate::kernels {

constexpr int kSweepRows = 64;
constexpr int kSweepThreads = 128;
constexpr int kSweepWarpsM = 2;  // warps along the rows; the other two take other keys
constexpr int kSweepWarpsN = 2;
constexpr int kSweepMTiles = kSweepRows / kSweepWarpsM / 16;

// Shapes of a sweep for head_dim padded to kDim. Two stages plus 64 histograms fit 99 KB.
template <int kDim>
struct SweepShape {
    static constexpr int kKeys = kDim > 128 ? 32 : 64;  // of a stage
    static constexpr int kWarpKeys = kKeys / kSweepWarpsN;
    static constexpr int kNTiles = kWarpKeys / 8;
    static constexpr int kKSteps = kDim / 16;
    static constexpr int kStageBytes = kKeys * kDim * 2;
    static constexpr int kStages = 2;
    static_assert(kSweepRows * kDim * 2 <= kStages * kStageBytes, "queries pass through the stages");
};

// Where this thread's accumulators lie: element e of acc[m][n].
struct SweepLane {
    int warp_m = static_cast<int>(threadIdx.x) / 32 % kSweepWarpsM;
    int warp_n = static_cast<int>(threadIdx.x) / 32 / kSweepWarpsM;
    int lane = static_cast<int>(threadIdx.x) % 32;

    __device__ int row(int m, int half) const {
        return (warp_m * kSweepMTiles + m) * 16 + half * 8 + lane / 4;
    }
    // Within this warp's keys of the tile.
    __device__ int warp_key(int n, int e) const { return n * 8 + 2 * (lane % 4) + (e & 1); }
};

template <int kDim>
struct SweepScores {
    static constexpr int kNTiles = SweepShape<kDim>::kNTiles;
    float acc[kSweepMTiles][kNTiles][4];
};

// The rows of a CTA: 64 consecutive (query, head of the group) pairs of one KV head.
struct SweepRows {
    int64_t query[kSweepRows];       // -1: no such row
    int32_t visible_end[kSweepRows]; // keys [0, visible_end) are visible
    int32_t last_visible_end;        // largest of the CTA
};

// Which rows of which KV head a CTA works on.
struct SweepCta {
    int batch;
    int kv_head;
    int group;
    int64_t first_row;   // in num_queries * group
    int64_t total_rows;

    // `num_queries` per head are swept; the longest rows of a head come first.
    __device__ SweepCta(const Problem& problem, int64_t num_queries)
        : group(problem.group()), total_rows(num_queries * problem.group()) {
        int64_t tiles = ceil_div(total_rows, kSweepRows);
        int64_t head = blockIdx.x / tiles;
        batch = static_cast<int>(head / problem.kv_heads);
        kv_head = static_cast<int>(head % problem.kv_heads);
        first_row = (tiles - 1 - blockIdx.x % tiles) * kSweepRows;
    }
    __device__ bool exists(int row) const { return first_row + row < total_rows; }
    // Which of the swept queries, and which query head, a row is.
    __device__ int64_t slot(int row) const { return (first_row + row) / group; }
    __device__ int64_t head(int row) const {
        return static_cast<int64_t>(kv_head) * group + (first_row + row) % group;
    }
};

inline int64_t sweep_ctas(const Problem& problem, int64_t num_queries) {
    return problem.batch * problem.kv_heads *
           ceil_div(num_queries * problem.group(), static_cast<int64_t>(kSweepRows));
}

// Keys [0, end) that a query sees.
__device__ __forceinline__ int32_t visible_keys(const Problem& problem, int64_t query) {
    if (!problem.causal) return static_cast<int32_t>(problem.kv_len);
    int64_t end = query_position(query, problem.query_len, problem.kv_len) + 1;
    return static_cast<int32_t>(max_i64(min_i64(end, problem.kv_len), 0));
}

// Fills the row table; `query_of(slot)` is the query index of a swept query, -1 if it has none.
// All threads call it; the table is visible to all on return.
template <class QueryOf>
__device__ void fill_sweep_rows(SweepRows& rows, const SweepCta& cta, const Problem& problem,
                                QueryOf&& query_of) {
    if (threadIdx.x == 0) rows.last_visible_end = 0;
    __syncthreads();
    int row = static_cast<int>(threadIdx.x);
    if (row < kSweepRows) {
        int64_t query = cta.exists(row) ? query_of(cta.slot(row)) : -1;
        int32_t end = query >= 0 ? visible_keys(problem, query) : 0;
        rows.query[row] = query;
        rows.visible_end[row] = end;
        atomicMax(&rows.last_visible_end, end);
    }
    __syncthreads();
}

// A operands of this warp's rows for the whole head_dim.
template <int kDim>
struct SweepQueries {
    uint32_t a[SweepShape<kDim>::kKSteps][kSweepMTiles][4];
};

// Reads the query rows through `stages_smem`, which is free again on return.
template <class T, int kDim>
__device__ void load_sweep_queries(SweepQueries<kDim>& queries, uint32_t stages_smem,
                                   const SweepRows& rows, const SweepCta& cta,
                                   const ConstTensor4& query, int head_dim) {
    constexpr int kChunks = kDim / 8;
    const T* base = static_cast<const T*>(query.data) + cta.batch * query.stride_batch;
    int chunk = static_cast<int>(threadIdx.x) % kChunks;
    for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kSweepRows;
         row += kSweepThreads / kChunks) {
        bool copy = rows.query[row] >= 0 && chunk * 8 < head_dim;
        const T* src = base;
        if (copy) {
            src += cta.head(row) * query.stride_head + rows.query[row] * query.stride_seq +
                   chunk * 8;
        }
        ptx::cp_async_16(stages_smem + device::tile_offset<kDim>(row, chunk), src, copy);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    SweepLane lane;
    uint32_t q_lane = device::row_major_lane<kDim>(stages_smem, lane.warp_m * kSweepMTiles * 16);
#pragma unroll
    for (int k_step = 0; k_step < SweepShape<kDim>::kKSteps; ++k_step) {
#pragma unroll
        for (int m = 0; m < kSweepMTiles; ++m) {
            ptx::ldmatrix_x4(queries.a[k_step][m],
                             device::chunk_pair_address<kDim>(q_lane, 16 * m, k_step));
        }
    }
    __syncthreads();
}

// Raw products of this warp's rows and its keys of one stage.
template <class T, int kDim>
__device__ __forceinline__ void score_stage(SweepScores<kDim>& scores,
                                            const SweepQueries<kDim>& queries,
                                            uint32_t stage_smem, int first_key) {
    constexpr int kNTiles = SweepShape<kDim>::kNTiles;
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores.acc[m][n][e] = 0.0f;
    uint32_t k_lane = device::column_major_lane<kDim>(stage_smem, first_key);
#pragma unroll
    for (int k_step = 0; k_step < SweepShape<kDim>::kKSteps; ++k_step) {
#pragma unroll
        for (int pair = 0; pair < kNTiles / 2; ++pair) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, device::chunk_pair_address<kDim>(k_lane, 16 * pair, k_step));
#pragma unroll
            for (int m = 0; m < kSweepMTiles; ++m) {
                ptx::mma_m16n8k16<T>(scores.acc[m][2 * pair], queries.a[k_step][m], b[0], b[1]);
                ptx::mma_m16n8k16<T>(scores.acc[m][2 * pair + 1], queries.a[k_step][m], b[2], b[3]);
            }
        }
    }
}

// Keys of one (batch, KV head).
template <class T>
struct SweepKeys {
    const T* data;
    int64_t stride_seq;
    int32_t kv_len;
    int head_dim;

    __device__ SweepKeys(const ConstTensor4& key, const SweepCta& cta, const Problem& problem)
        : data(static_cast<const T*>(key.data) + cta.batch * key.stride_batch +
               cta.kv_head * key.stride_head),
          stride_seq(key.stride_seq),
          kv_len(static_cast<int32_t>(problem.kv_len)),
          head_dim(static_cast<int>(problem.head_dim)) {}
};

// Calls body(scores, first_key) for every tile that holds keys of [begin, end), ascending, where
// scores.acc are products before scaling and first_key is the tile's first key of this *warp*.
// Keys at or past kv_len score 0. All threads call it; shared memory is quiet on return.
template <class T, int kDim, class Body>
__device__ __forceinline__ void sweep_keys(const SweepQueries<kDim>& queries, uint32_t stages_smem,
                                           const SweepKeys<T>& keys, int32_t begin, int32_t end,
                                           Body&& body) {
    using Shape = SweepShape<kDim>;
    if (begin >= end) return;
    auto copy = [&](int32_t tile) {
        int64_t first = static_cast<int64_t>(tile) * Shape::kKeys;
        device::copy_tile_async<Shape::kKeys, kDim, kSweepThreads>(
            stages_smem + tile % Shape::kStages * Shape::kStageBytes,
            keys.data + first * keys.stride_seq, keys.stride_seq, keys.kv_len - first,
            keys.head_dim);
        ptx::cp_async_commit();
    };
    SweepLane lane;
    int32_t last_tile = (end - 1) / Shape::kKeys;
    copy(begin / Shape::kKeys);
    for (int32_t tile = begin / Shape::kKeys; tile <= last_tile; ++tile) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // the tile is complete, and nobody reads the other stage any more
        if (tile < last_tile) copy(tile + 1);
        SweepScores<kDim> scores;
        int warp_offset = lane.warp_n * Shape::kWarpKeys;
        score_stage<T, kDim>(scores, queries,
                             stages_smem + tile % Shape::kStages * Shape::kStageBytes, warp_offset);
        body(scores, tile * Shape::kKeys + warp_offset);
    }
    __syncthreads();
}

}  // namespace condensate::kernels
