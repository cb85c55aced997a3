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

// A tile's walk in shared memory: its first blocks written down, and how it goes on. Consecutive
// warps step along it.
template <int kWarps, int kRecorded>
struct WalkSmem {
    BlockWalk rest;
    int recorded;
    bool complete;                 // there are no others
    BlockWalk unrecorded[kWarps];  // each warp's, which its lane 0 alone touches
    int32_t blocks[kRecorded];

    // One thread calls it; who steps along must see what it writes.
    __device__ void set(const AttentionParams& params, const TileRows& tile) {
        BlockWalk walk = tile_walk(params, tile);
        int count = 0, block = 0;
        while (count < kRecorded && (block = walk.next().block) != INT_MAX) blocks[count++] = block;
        recorded = count;
        complete = block == INT_MAX;
        rest = walk;
    }

    // A warp's next block behind the recorded ones.
    __device__ __forceinline__ int next_unrecorded(bool first) {
        int of_first_lane = 0;
        if ((threadIdx.x & 31) == 0) {
            BlockWalk& walk = unrecorded[threadIdx.x / 32 % kWarps];
            if (first) walk = rest;
            of_first_lane = walk.next().block;
        }
        return __shfl_sync(0xffffffffu, of_first_lane, 0);
    }
};

// A warp's walk from the beginning, and the block that it stands on, INT_MAX at the end. All lanes
// step together. BlockWalk itself would take a dozen registers of each.
template <class Smem>
class WarpWalk {
  public:
    int block;

    __device__ explicit WarpWalk(Smem& smem) : smem_(smem) { next(); }
    // The same tile's walk once more.
    __device__ WarpWalk again() const { return WarpWalk(smem_); }

    __device__ void next() {
        const int place = place_++;
        if (place < smem_.recorded)
            block = smem_.blocks[place];
        else
            block = smem_.complete ? INT_MAX : smem_.next_unrecorded(place == smem_.recorded);
    }
    __device__ void skip_to(int end) {
        while (block < end) next();
    }

  private:
    Smem& smem_;
    int place_ = 0;
};

}  // namespace condensate::device
