// A CTA of 32 query rows scores every key of a range.
#pragma once

#include <cstdint>

#include "condensate/kv_view.h"
#include "condensate/params.h"
#include "device/query_rows.h"
#include "device/simt/key_tile.h"

namespace condensate::kernels::simt {

using Rows = RowTable<kCtaRows>;

// The sweeps are not worth an instantiation per head_dim: shared memory is sized for the largest.
struct SweepSmem {
    float queries[kCtaRows * kMaxHeadDim];
    KeyTile<kMaxHeadDim> keys;
    Rows rows;
};

// Loads this warp's query rows. The row table is filled.
template <class T>
__device__ __forceinline__ void load_queries(SweepSmem& smem, const RowGroup& cta,
                                             const ConstTensor4& query, int head_dim) {
    Lane lane;
    for (int r = 0; r < kWarpRows; ++r) {
        int row = lane.row(r);
        const T* src = nullptr;
        if (smem.rows.query[row] >= 0)
            src = static_cast<const T*>(query.data) +
                  query.offset(cta.batch, cta.head(row), smem.rows.query[row]);
        load_query(smem.queries + row * kMaxHeadDim, src, head_dim);
    }
    __syncwarp();
}

// Calls body(scores, key) for every 32 keys that hold some of [begin, end), ascending: the scaled
// scores of the warp's rows and this lane's key. Keys at or past kv_len score 0. All threads call
// it.
template <class T, class Body>
__device__ __forceinline__ void sweep_keys(SweepSmem& smem, const RowGroup& cta,
                                           const ConstTensor4& key, const Problem& problem,
                                           int32_t begin, int32_t end, Body&& body) {
    Lane lane;
    const KvView keys = KvView::of(key, sizeof(T), cta.batch, cta.kv_head);
    const float* queries_smem = smem.queries + lane.row(0) * kMaxHeadDim;
    const float* key_smem = smem.keys.element + lane.lane * smem.keys.kStride;
    int head_dim = static_cast<int>(problem.head_dim);
    for (int64_t first = begin / kTileKeys * kTileKeys; first < end; first += kTileKeys) {
        __syncthreads();  // everyone is done with the previous keys
        stage_rows<T>(smem.keys.element, smem.keys.kStride, keys, first, cta.kv_len, head_dim);
        __syncthreads();
        float score[kWarpRows];
        score_rows(score, queries_smem, kMaxHeadDim, key_smem, head_dim, problem.scale);
        body(score, static_cast<int32_t>(first) + lane.lane);
    }
}

}  // namespace condensate::kernels::simt
