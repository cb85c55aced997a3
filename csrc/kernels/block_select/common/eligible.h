// The blocks that a tile's list may name, and the blocks that its attention walks, in closed form.
#pragma once

#include <climits>
#include <cstdint>

#include "condensate/params.h"
#include "condensate/tile.h"

namespace condensate::kernels::block_select {

// is_eligible() of every block of a tile: before the windows, and (without causality) after them.
struct alignas(16) EligibleBlocks {
    int begin, low_end, high_begin, end;  // [begin, low_end) and [high_begin, end)

    CONDENSATE_HOST_DEVICE EligibleBlocks(const Ranges& r, TileSpan t, WholeBlocks whole)
        : begin(0), low_end(0), high_begin(0), end(0) {
        if (r.anchors >= r.kv_len) return;
        const int64_t first = r.anchors / kBlockKeys, blocks = num_blocks(r.kv_len);
        int64_t low = blocks, high = blocks;  // ends and begins of the two parts
        if (r.causal || r.window > 0) {
            int64_t last_key = t.last - max_i64(r.window, 0);  // that precedes some window
            low = last_key < r.anchors ? first : min_i64(last_key / kBlockKeys + 1, blocks);
        }
        if (!r.causal && r.window > 0) {
            int64_t first_key = t.first + r.window;  // that follows some window
            if (first_key < r.kv_len) high = max_i64(first_key, 0) / kBlockKeys;
        }
        const int64_t attended = whole == WholeBlocks::kNone ? 0 : anchor_blocks(r, t).end;
        const BlockRange window = window_blocks(r, t);
        if (whole == WholeBlocks::kAll && window.end > window.begin) {
            low = min_i64(low, window.begin);
            high = max_i64(high, window.end);
        }
        begin = static_cast<int>(max_i64(first, attended));
        low_end = static_cast<int>(max_i64(low, begin));
        high_begin = static_cast<int>(max_i64(high, low_end));
        end = static_cast<int>(max_i64(blocks, high_begin));
    }
    CONDENSATE_HOST_DEVICE int count() const { return (low_end - begin) + (end - high_begin); }
    CONDENSATE_HOST_DEVICE bool contains(int block) const {
        return (block >= begin & block < low_end) | (block >= high_begin & block < end);
    }
    // The i-th of them, ascending.
    CONDENSATE_HOST_DEVICE int at(int i) const {
        return begin + i < low_end ? begin + i : high_begin + (i - (low_end - begin));
    }
};

// Of a tile or scan tile.
__device__ __forceinline__ EligibleBlocks eligible_blocks(const BlockSelectParams& params,
                                                          const Tile& tile) {
    return EligibleBlocks(tile.ranges(params.problem), tile.span(),
                          params.whole_blocks(tile.positions));
}

// What a tile may list of its scan tile's shortlist: the entries that are eligible for it too.
// Those that are not come after all that are (they lie past the tile), or lie in its windows.
struct TileShortlist {
    const int32_t* list;
    int low;      // eligible entries before those that are not
    int skipped;  // entries that are not
    int count;    // eligible entries
    int entries;  // up to the last eligible one

    // The entry that is the i-th eligible one.
    __device__ int place(int i) const { return i < low ? i : i + skipped; }
    __device__ int operator[](int i) const { return __ldg(list + place(i)); }

    // The whole warp calls it.
    __device__ TileShortlist(const int32_t* list, int size, const EligibleBlocks& eligible)
        : list(list), low(0) {
        int before_high = 0;
        for (int first = 0; first < size; first += 32) {
            int i = first + static_cast<int>(threadIdx.x & 31);
            int entry = i < size ? __ldg(list + i) : INT_MAX;
            low += __popc(__ballot_sync(0xffffffffu, entry < eligible.low_end));
            before_high += __popc(__ballot_sync(0xffffffffu, entry < eligible.high_begin));
        }
        skipped = before_high - low;
        count = size - skipped;
        entries = count > low ? size : low;
    }
};

// The blocks of BlockWalk over a valid list, by their place in its order, so that threads
// need not walk: anchors, entries before the window, window, entries after it.
struct WalkedBlocks {
    const int32_t* list;
    int anchors_end;
    int middle_begin, middle_end;  // list entries between anchors and window
    int window_begin, window_end;
    int high_begin;  // first list entry past the window
    int size;

    __device__ __forceinline__ int at(int i) const {
        if (i < anchors_end) return i;
        i += middle_begin - anchors_end;
        if (i < middle_end) return __ldg(list + i);
        i += window_begin - middle_end;
        if (i < window_end) return i;
        return __ldg(list + (i - window_end + high_begin));
    }

    // The whole warp calls it.
    __device__ WalkedBlocks(const RangeBlocks& ranges, const int32_t* list, int count)
        : list(list),
          anchors_end(ranges.anchors_end),
          middle_begin(0),
          middle_end(0),
          window_begin(ranges.window_begin),
          window_end(ranges.window_end),
          high_begin(0) {
        for (int first = 0; first < count; first += 32) {
            int i = first + static_cast<int>(threadIdx.x & 31);
            int entry = i < count ? __ldg(list + i) : INT_MAX;
            middle_begin += __popc(__ballot_sync(0xffffffffu, entry < anchors_end));
            middle_end += __popc(__ballot_sync(0xffffffffu, entry < window_begin));
            high_begin += __popc(__ballot_sync(0xffffffffu, entry < window_end));
        }
        size = anchors_end + (middle_end - middle_begin) + (window_end - window_begin) +
               (count - high_begin);
    }
};

}  // namespace condensate::kernels::block_select
