// A CTA scores 64 query rows against every key of a range: what the kernels that look at all keys
// share. Queries stay in registers, keys pass through two stages of shared memory, and each tile
// of scores goes to a body.
#pragma once

#include <cstdint>

#include "condensate/kv_view.h"
#include "condensate/params.h"
#include "device/mma_tile.h"
#include "device/query_rows.h"
#include "device/smem_tile.h"
#include "ptx/cp_async.h"

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
    static_assert(kSweepRows * kDim * 2 <= kStages * kStageBytes,
                  "queries pass through the stages");
};

// Where this thread's accumulators lie: element e of acc[m][n].
struct SweepLane {
    int warp_m = static_cast<int>(threadIdx.x) / 32 % kSweepWarpsM;
    int warp_n = static_cast<int>(threadIdx.x) / 32 / kSweepWarpsM;
    int lane = static_cast<int>(threadIdx.x) % 32;

    __device__ int row_begin() const { return warp_m * kSweepMTiles * 16; }
    __device__ int row(int m, int half) const { return row_begin() + 16 * m + 8 * half + lane / 4; }
    // Within this warp's keys of the tile.
    __device__ int warp_key(int n, int e) const { return n * 8 + 2 * (lane % 4) + (e & 1); }
};

template <int kDim>
struct SweepScores {
    static constexpr int kNTiles = SweepShape<kDim>::kNTiles;
    float acc[kSweepMTiles][kNTiles][4];
};

using SweepRows = RowTable<kSweepRows>;

// A operands of this warp's rows for the whole head_dim.
template <int kDim>
struct SweepQueries {
    uint32_t a[SweepShape<kDim>::kKSteps][kSweepMTiles][4];
};

// Reads the query rows through `stages_smem`, which is free again on return.
template <class T, int kDim>
__device__ void load_sweep_queries(SweepQueries<kDim>& queries, uint32_t stages_smem,
                                   const SweepRows& rows, const RowGroup& cta,
                                   const ConstTensor4& query, int head_dim) {
    constexpr int kChunks = kDim / 8;
    const T* base = static_cast<const T*>(query.data);
    int chunk = static_cast<int>(threadIdx.x) % kChunks;
    for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kSweepRows;
         row += kSweepThreads / kChunks) {
        bool copy = rows.query[row] >= 0 && chunk * 8 < head_dim;
        const T* src = base;
        if (copy) src += query.offset(cta.batch, cta.head(row), rows.query[row]) + chunk * 8;
        ptx::cp_async_16(stages_smem + device::tile_offset<kDim>(row, chunk), src, copy);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    SweepLane lane;
    device::load_a_tiles<kDim, kSweepMTiles>(queries.a, stages_smem, lane.row_begin());
    __syncthreads();
}

// Keys of one (batch, KV head).
template <class T>
struct SweepKeys {
    KvView rows;
    int32_t kv_len;
    int head_dim;

    __device__ SweepKeys(const ConstTensor4& key, const RowGroup& cta, const Problem& problem)
        : rows(KvView::of(key, sizeof(T), cta.batch, cta.kv_head)),
          kv_len(static_cast<int32_t>(cta.kv_len)),
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
        device::copy_tile_async<T, Shape::kKeys, kDim, kSweepThreads>(
            stages_smem + tile % Shape::kStages * Shape::kStageBytes, keys.rows, first,
            keys.kv_len - first, keys.head_dim);
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
        int warp_offset = lane.warp_n * Shape::kWarpKeys;  // whole swizzle periods of 8 rows
        device::score_tile<T, kDim>(
            scores.acc, queries.a,
            stages_smem + tile % Shape::kStages * Shape::kStageBytes + warp_offset * kDim * 2);
        body(scores, tile * Shape::kKeys + warp_offset);
    }
    __syncthreads();
}

}  // namespace condensate::kernels
