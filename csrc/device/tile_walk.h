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

// A walk and the block that it stands on, INT_MAX at the end.
struct WalkCursor {
    BlockWalk walk;
    int block;

    __device__ explicit WalkCursor(const BlockWalk& begin) : walk(begin) { next(); }
    __device__ void next() { block = walk.next().block; }
    __device__ void skip_to(int end) {
        while (block < end) next();
    }
};

}  // namespace condensate::device
