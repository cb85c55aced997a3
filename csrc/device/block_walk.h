// The key blocks that a tile attends, each once, ascending: anchors, window and list merged.
#pragma once

#include <climits>
#include <cstdint>

#include "condensate/far_field.h"

namespace condensate::device {

struct BlockStep {
    int block;     // INT_MAX at the end
    bool listed;   // every visible key of it is attended
    bool sampled;  // gap_stride() wants it; set for listed blocks only
};

// Invalid list entries (negative, out of range, not ascending) are skipped and noted in `errors`.
class BlockWalk {
  public:
    // `list` may be null; `count` is the claimed number of entries, `width` the list's true size.
    __device__ BlockWalk(const Ranges& ranges, TileSpan tile, const int32_t* list, int64_t count,
                         int64_t width)
        : list_(list) {
        if (count < 0 || count > width) errors = kErrorBlockCount;
        count_ = static_cast<int>(min_i64(max_i64(count, 0), width));
        num_blocks_ = static_cast<int>(num_blocks(ranges.kv_len));
        end_ = reachable_blocks(ranges, tile);
        BlockRange anchors = anchor_blocks(ranges, tile), window = window_blocks(ranges, tile);
        anchors_end_ = static_cast<int>(anchors.end);
        window_begin_ = static_cast<int>(max_i64(window.begin, anchors.end));
        window_end_ = static_cast<int>(window.end);
        advance_range(-1);
        advance_list();
    }

    // All blocks that any row of the tile can see.
    __device__ BlockWalk(const Ranges& ranges, TileSpan tile)
        : BlockWalk({ranges.kv_len, 0, ranges.kv_len, ranges.causal}, tile, nullptr, 0, 0) {}

    __device__ BlockStep next() {
        int block = next_range_ < next_list_ ? next_range_ : next_list_;
        if (block == INT_MAX) return {block, false, false};
        bool listed = block == next_list_;
        bool sampled = listed && to_sample_ == 0;
        if (block == next_range_) advance_range(block);
        if (listed) {
            to_sample_ = (sampled ? static_cast<int>(gap_stride(count_)) : to_sample_) - 1;
            advance_list();
        }
        return {block, listed, sampled};
    }

    uint32_t errors = 0;

  private:
    __device__ void advance_range(int previous) {
        int block = previous + 1;
        if (block >= anchors_end_ && block < window_begin_) block = window_begin_;
        next_range_ = block < anchors_end_ || block < window_end_ ? block : INT_MAX;
    }

    __device__ void advance_list() {
        next_list_ = INT_MAX;
        while (cursor_ < count_) {
            int entry = __ldg(list_ + cursor_++);
            if (entry <= last_entry_ || entry >= num_blocks_) {
                errors |= kErrorBlockIndex;
                continue;
            }
            last_entry_ = entry;
            if (entry >= end_) continue;  // valid, but past every row of the tile
            next_list_ = entry;
            return;
        }
    }

    int to_sample_ = 0;  // listed blocks until the next sampled one
    const int32_t* list_;
    int count_ = 0, cursor_ = 0, last_entry_ = -1;
    int num_blocks_, end_;
    int anchors_end_, window_begin_, window_end_;
    int next_range_ = INT_MAX, next_list_ = INT_MAX;
};

}  // namespace condensate::device
