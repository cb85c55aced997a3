// Scores of up to 32 rows of a tile against the units of one level of some blocks, on CUDA cores: a
// unit per lane, four rows per warp.
#pragma once

#include <cstdint>

#include "condensate/kv_view.h"
#include "condensate/params.h"
#include "condensate/tile.h"
#include "device/simt/key_tile.h"
#include "kernels/block_select/common/scored_rows.h"
#include "kernels/block_select/common/top_blocks.h"

namespace condensate::kernels::simt {

using block_select::PooledRows;

constexpr int kSlabDim = 128;  // channels of the units that are staged at a time
constexpr int64_t kNoPosition = INT64_MIN;

struct alignas(16) SelectSmem {
    KeyTile<kSlabDim> units;
    float warp_mass[kWarps][kTileKeys];  // per warp: masses of the blocks of 32 units
    uint32_t histogram[block_select::kRadixBins];
    int64_t position[kCtaRows];  // of the rows in `queries`; kNoPosition where there is none
    float norm[kTileRows];       // natural log of a row's softmax sum; +inf: it has no masses
    int count;                   // of what one warp or thread found for all
    int shortlisted;             // blocks of the scan tile's shortlist
    // The rows follow: [kCtaRows][summary_dim] float.
    __device__ float* queries() { return reinterpret_cast<float*>(this + 1); }
};

// Ascending blocks.
struct BlockSet {
    const int32_t* blocks;  // null: 0 .. count - 1
    int count;
    __device__ int at(int i) const { return blocks ? blocks[i] : i; }
    __device__ bool contains(int block) const {
        int low = 0, high = count;  // entries before low are smaller, from high on not
        while (low < high) {
            int middle = (low + high) / 2;
            bool smaller = at(middle) < block;
            low = smaller ? middle + 1 : low;
            high = smaller ? high : middle;
        }
        return low < count && at(low) == block;
    }
};

template <class T>
struct UnitSweep {
    SelectSmem& smem;
    const BlockSelectParams& params;
    const Tile& tile;
    const T* summaries;  // of the KV head
    int dim;             // summary_dim
    Lane lane = {};

    __device__ const T* query(int head, int64_t index) const {
        return static_cast<const T*>(params.query.data) +
               params.query.offset(tile.batch, head, index);
    }

    // One mean query in float32, rounded to its dtype. Quest's bound is a dot product of
    // [max(q,0) | min(q,0)] with [max | min].
    __device__ void load_pooled(const PooledRows& pooled, int first_row) {
        const int head_dim = static_cast<int>(params.problem.head_dim);
        __syncwarp();  // no lane reads the rows before these any more
        for (int r = 0; r < kWarpRows; ++r) {
            int row = first_row + lane.row(r), size = pooled.size(row);
            float* to_smem = smem.queries() + lane.row(r) * dim;
            for (int d = lane.lane; d < head_dim; d += 32) {
                float sum = 0.0f;
                for (int i = 0; i < size; ++i)
                    sum += to_float(query(pooled.head(row), pooled.first_query(row) + i)[d]);
                float mean =
                    size > 0 ? to_float(from_float<T>(sum / static_cast<float>(size))) : 0.0f;
                bool quest = selector_traits(params.selector).content == UnitContent::kBounds;
                to_smem[d] = quest && mean < 0.0f ? 0.0f : mean;
                if (quest) to_smem[head_dim + d] = mean > 0.0f ? 0.0f : mean;
            }
            if (lane.lane == 0)
                smem.position[lane.row(r)] = size > 0 ? pooled.last_position(row) : kNoPosition;
        }
        __syncwarp();
    }

    // A unit of a level: a row of the summaries, or a key; null past the last key.
    __device__ const T* unit_row(UnitLevel level, int64_t unit) const {
        if (level.keys > 1)
            return summaries + summary_row(level, rows_per_block(params.selector), unit) * dim;
        if (unit >= tile.kv_len) return nullptr;
        return KvView::of(params.key, sizeof(T), tile.batch, tile.kv_head).row<T>(unit);
    }

    // Calls body(scores, place of this lane's block) for every unit, 32 at a time: the scores of
    // the warp's rows against the lane's unit, -inf where a row does not see it. All threads call
    // it, and the body too, which may use barriers; the place can be past the last block.
    template <class Body>
    __device__ __forceinline__ void sweep(UnitLevel level, BlockSet set, Body&& body) {
        const Ranges ranges = tile.ranges(params.problem);
        auto unit_of = [&](int i) {  // of the whole level; -1 past the last block
            return i / level.per_block < set.count
                       ? int64_t{set.at(i / level.per_block)} * level.per_block +
                             i % level.per_block
                       : -1;
        };
        for (int first = 0; first < set.count * level.per_block; first += kTileKeys) {
            float score[kWarpRows] = {};
            for (int slab = 0; slab < dim; slab += kSlabDim) {
                const int slab_dim = min(dim - slab, kSlabDim);
                __syncthreads();  // everyone is done with the previous units
                for (int i = lane.warp; i < kTileKeys; i += kWarps) {
                    int64_t unit = unit_of(first + i);
                    const T* src = unit < 0 ? nullptr : unit_row(level, unit);
                    load_query(smem.units.element + i * smem.units.kStride,
                               src ? src + slab : nullptr, slab_dim);
                }
                __syncthreads();
                accumulate_products(score, smem.queries() + lane.row(0) * dim + slab, dim,
                                    smem.units.element + lane.lane * smem.units.kStride, slab_dim);
            }
            const int64_t unit = unit_of(first + lane.lane);
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                int64_t position = smem.position[lane.row(r)];
                bool sees = unit >= 0 && position != kNoPosition &&
                            is_unit_visible(ranges, position, unit, level.keys);
                score[r] = sees ? __fmul_rn(score[r], params.problem.scale) : -INFINITY;
            }
            body(score, (first + lane.lane) / level.per_block);
        }
    }
};

}  // namespace condensate::kernels::simt
