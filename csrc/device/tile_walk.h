// A tile's walk, written down by a warp.
#pragma once

#include "condensate/block_walk.h"

namespace condensate::device {

// Blocks of a walk, and those of them below some block.
struct WalkCount {
    int all, below;
};

// Writes the first blocks of a walk, as BlockWalk finds them, 32 list entries at a time.
class WalkWriter {
  public:
    // `room` blocks at most are written; those below `below` are counted apart.
    __device__ WalkWriter(int32_t* blocks, int room, int below)
        : blocks_(blocks), room_(room), below_(below) {}

    // The whole warp calls it.
    __device__ WalkCount write(const Ranges& ranges, TileSpan span, const TileList& list) {
        const RangeBlocks beside(ranges, span);
        put_range(0, beside.anchors_end);
        put_listed(ranges, list, beside.anchors_end, beside.window_begin);
        put_range(beside.window_begin, beside.window_end);
        put_listed(ranges, list, beside.window_end, reachable_blocks(ranges, span));
        return count_;
    }

  private:
    static constexpr unsigned kAllLanes = 0xffffffffu;

    __device__ void put_range(int begin, int end) {
        for (int block = begin + lane_; block < end; block += 32)
            if (count_.all + block - begin < room_) blocks_[count_.all + block - begin] = block;
        count_.all += end - begin;
        count_.below += max(min(end, below_) - begin, 0);
    }

    // Valid entries of the list in [begin, end): those that exceed all valid ones before.
    __device__ void put_listed(const Ranges& ranges, const TileList& list, int begin, int end) {
        if (begin >= end) return;
        const int blocks_of_keys = static_cast<int>(num_blocks(ranges.kv_len)), size = list.size();
        int before = -1;  // the largest valid entry so far
        for (int first = 0; first < size; first += 32) {
            int entry = first + lane_ < size ? list.entries[first + lane_] : -1;
            if (entry >= blocks_of_keys) entry = -1;
            int largest = entry;  // of this lane's and those before
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kAllLanes, largest, step);
                if (lane_ >= step) largest = max(largest, other);
            }
            const int previous = __shfl_up_sync(kAllLanes, largest, 1);
            const bool valid = entry > max(before, lane_ > 0 ? previous : -1);
            const bool put = valid && entry >= begin && entry < end;
            const unsigned puts = __ballot_sync(kAllLanes, put);
            const int place = count_.all + __popc(puts & ((1u << lane_) - 1));
            if (put && place < room_) blocks_[place] = entry;
            count_.all += __popc(puts);
            count_.below += __popc(__ballot_sync(kAllLanes, put && entry < below_));
            before = max(before, __shfl_sync(kAllLanes, largest, 31));
        }
    }

    int32_t* blocks_;
    const int room_, below_;
    const int lane_ = static_cast<int>(threadIdx.x & 31);
    WalkCount count_ = {0, 0};
};

// A tile's walk in shared memory: its first blocks written down, and how it goes on. Consecutive
// warps step along it.
template <int kWarps, int kRecorded>
struct WalkSmem {
    static constexpr int kMostRecorded = kRecorded;

    BlockWalk rest;  // behind the recorded blocks, of a walk that is not complete
    int recorded;
    bool complete;                 // there are no others
    BlockWalk unrecorded[kWarps];  // each warp's, which its lane 0 alone touches
    int32_t blocks[kRecorded];

    // One warp calls it; who steps along must see what it writes. Counts the blocks, and those
    // below `below`.
    __device__ WalkCount record(const AttentionParams& params, const Tile& tile, int below) {
        const Ranges ranges = tile.ranges(params.problem);
        const TileList list = TileList::of(params, tile);
        const WalkCount count =
            WalkWriter(blocks, kRecorded, below).write(ranges, tile.span(), list);
        if ((threadIdx.x & 31) == 0) {
            recorded = min(count.all, kRecorded);
            complete = count.all <= kRecorded;
            if (!complete) {
                BlockWalk walk(ranges, tile.span(), list);
                for (int n = 0; n < kRecorded; ++n) walk.next();
                rest = walk;
            }
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
