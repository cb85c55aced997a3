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
    if (params.block_counts) {  // of width 0 there are counts without entries
        list = params.block_indices + tile.tile_index * params.max_blocks;
        count = params.block_counts[tile.tile_index];
    }
    return BlockWalk(params.problem.ranges(), tile.span(), list, count,
                     params.block_counts ? params.max_blocks : 0);
}

// Blocks of a walk, and those of them below some block.
struct WalkCount {
    int all, below;
};

// A tile's walk in shared memory: its first blocks written down, and how it goes on. Consecutive
// warps step along it.
template <int kWarps, int kRecorded>
struct WalkSmem {
    static constexpr int kMostRecorded = kRecorded;

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

    // The same by a whole warp, 32 list entries at a time. Counts the blocks, and those below
    // `end`.
    __device__ WalkCount set_by_warp(const AttentionParams& params, const TileRows& tile, int end) {
        const Ranges ranges = params.problem.ranges();
        const TileSpan span = tile.span();
        const RangeBlocks walked(ranges, span);
        WalkCount count = {0, 0};
        put_range(&count, 0, walked.anchors_end, end);
        put_listed(&count, params, tile, walked.anchors_end, walked.window_begin, end);
        put_range(&count, walked.window_begin, walked.window_end, end);
        put_listed(&count, params, tile, walked.window_end, reachable_blocks(ranges, span), end);
        if (count.all > kRecorded) {
            if ((threadIdx.x & 31) == 0) set(params, tile);
        } else {
            recorded = count.all;
            complete = true;
        }
        return count;
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
    // Both write blocks behind those counted so far, as far as there is room, and count them.
    __device__ void put_range(WalkCount* count, int begin, int end, int below) {
        for (int block = begin + static_cast<int>(threadIdx.x & 31); block < end; block += 32)
            if (count->all + block - begin < kRecorded) blocks[count->all + block - begin] = block;
        count->all += end - begin;
        count->below += max(min(end, below) - begin, 0);
    }

    // Valid entries of the list in [begin, end): those that exceed all valid ones before.
    __device__ void put_listed(WalkCount* count, const AttentionParams& params,
                               const TileRows& tile, int begin, int end, int below) {
        if (!params.block_indices || begin >= end) return;
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
            const int place = count->all + __popc(puts & ((1u << lane) - 1));
            if (put && place < kRecorded) blocks[place] = entry;
            count->all += __popc(puts);
            count->below += __popc(__ballot_sync(kAll, put && entry < below));
            before = max(before, __shfl_sync(kAll, largest, 31));
        }
    }
};

// A warp's walk, and the block that it stands on: -1 before the first, INT_MAX at the end. All
// lanes step together. BlockWalk itself would take a dozen registers of each.
template <class Smem>
class WarpWalk {
  public:
    int block = -1;

    __device__ explicit WarpWalk(Smem& smem) : smem_(smem) {}

    __device__ void rewind() {
        place_ = 0;
        block = -1;
    }
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

    // Is the whole walk written down?
    __device__ bool is_recorded() const { return smem_.complete; }
    // Of a recorded walk, the places as bits at which runs of 2^log2_run blocks begin that hold
    // some block below `end`.
    __device__ uint64_t run_starts(int log2_run, int end) const {
        static_assert(Smem::kMostRecorded <= 64, "a bit a place");
        return uint64_t{starts_among(32, log2_run, end)} << 32 | starts_among(0, log2_run, end);
    }
    __device__ void stand_at(int place) {
        block = smem_.blocks[place];
        place_ = place + 1;
    }

  private:
    __device__ uint32_t starts_among(int first, int log2_run, int end) const {
        const int place = first + static_cast<int>(threadIdx.x & 31);
        bool starts = place < smem_.recorded && smem_.blocks[place] < end;
        if (starts && place > 0)
            starts = smem_.blocks[place - 1] >> log2_run != smem_.blocks[place] >> log2_run;
        return __ballot_sync(0xffffffffu, starts);
    }

    Smem& smem_;
    int place_ = 0;
};

}  // namespace condensate::device
