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

    // The same by a whole warp, 32 list entries at a time.
    __device__ void set_by_warp(const AttentionParams& params, const TileRows& tile) {
        const Ranges ranges = params.problem.ranges();
        const TileSpan span = tile.span();
        const RangeBlocks walked(ranges, span);
        int count = put_range(0, 0, walked.anchors_end);
        count = put_listed(count, params, tile, walked.anchors_end, walked.window_begin);
        count = put_range(count, walked.window_begin, walked.window_end);
        count = put_listed(count, params, tile, walked.window_end, reachable_blocks(ranges, span));
        if (count > kRecorded) {
            if ((threadIdx.x & 31) == 0) set(params, tile);
        } else {
            recorded = count;
            complete = true;
        }
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

  private:
    // Both write blocks from place `count` on, as far as there is room, and return the next place.
    __device__ int put_range(int count, int begin, int end) {
        for (int block = begin + static_cast<int>(threadIdx.x & 31); block < end; block += 32)
            if (count + block - begin < kRecorded) blocks[count + block - begin] = block;
        return count + end - begin;
    }

    // Valid entries of the list in [begin, end): those that exceed all valid ones before.
    __device__ int put_listed(int count, const AttentionParams& params, const TileRows& tile,
                              int begin, int end) {
        if (!params.block_indices || begin >= end) return count;
        constexpr unsigned kAll = 0xffffffffu;
        const int lane = threadIdx.x & 31;
        const int32_t* list = params.block_indices + tile.tile_index * params.max_blocks;
        const int blocks_of_keys = static_cast<int>(num_blocks(params.problem.kv_len));
        const int64_t claimed = params.block_counts[tile.tile_index];
        const int size = static_cast<int>(min_i64(max_i64(claimed, 0), params.max_blocks));
        int before = -1;  // the largest valid entry so far
        for (int first = 0; first < size; first += 32) {
            int entry = first + lane < size ? __ldg(list + first + lane) : -1;
            if (entry >= blocks_of_keys) entry = -1;
            int largest = entry;  // of this lane's and those before
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kAll, largest, step);
                if (lane >= step) largest = max(largest, other);
            }
            const int previous = __shfl_up_sync(kAll, largest, 1);
            const bool valid = entry > max(before, lane > 0 ? previous : -1);
            const bool put = valid && entry >= begin && entry < end;
            const unsigned puts = __ballot_sync(kAll, put);
            const int place = count + __popc(puts & ((1u << lane) - 1));
            if (put && place < kRecorded) blocks[place] = entry;
            count += __popc(puts);
            before = max(before, __shfl_sync(kAll, largest, 31));
        }
        return count;
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
