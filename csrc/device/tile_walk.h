// The walk of one tile of an attention call.
#pragma once

#include "condensate/params.h"
#include "device/block_walk.h"
#include "device/tile_rows.h"

namespace condensate::device {

// Over anchors, window and the tile's list.
__device__ __forceinline__ BlockWalk tile_walk(const AttentionParams& params,
                                               const TileRows& tile) {
    const int32_t* list = nullptr;
    int64_t count = 0;
    if (params.block_indices) {
        list = params.block_indices + tile.tile_index * params.max_blocks;
        count = params.block_counts[tile.tile_index];
    }
    return BlockWalk(params.problem.ranges(), tile.span(), list, count,
                     list ? params.max_blocks : 0);
}

// A warp's walk in shared memory, which only lane 0 touches.
struct WalkSmem {
    BlockWalk begin, now;

    __device__ void set(const AttentionParams& params, const TileRows& tile) {
        if ((threadIdx.x & 31) == 0) begin = tile_walk(params, tile);
    }
};

// The warp's walk from its beginning, and the block that it stands on, INT_MAX at the end. It lies
// in shared memory because it would take a dozen registers of each lane. All lanes step together.
class WarpWalk {
  public:
    int block;

    __device__ explicit WarpWalk(WalkSmem& smem) : now_smem_(smem.now) {
        if ((threadIdx.x & 31) == 0) now_smem_ = smem.begin;
        next();
    }
    __device__ void next() {
        int first_lane = (threadIdx.x & 31) == 0 ? now_smem_.next().block : 0;
        block = __shfl_sync(0xffffffffu, first_lane, 0);
    }
    __device__ void skip_to(int end) {
        while (block < end) next();
    }

  private:
    BlockWalk& now_smem_;
};

}  // namespace condensate::device
