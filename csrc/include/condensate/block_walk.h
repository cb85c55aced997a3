// The walk of a tile: the blocks that its attention visits, each once, ascending. Anchors, window
// and list are merged here and nowhere else; device/tile_walk.h writes the same walk by a warp.
#pragma once

#include <climits>
#include <cstdint>

#include "condensate/far_field.h"
#include "condensate/params.h"
#include "condensate/tile.h"

namespace condensate {

// A tile's list as the caller gave it: nothing of it can be trusted.
struct TileList {
    const int32_t* entries = nullptr;  // null: there is none
    int64_t claimed = 0;               // entries
    int64_t width = 0;                 // places

    CONDENSATE_HOST_DEVICE static TileList of(const AttentionParams& params, const Tile& tile) {
        // Of width 0 there are counts without entries.
        if (params.block_counts == nullptr) return {};
        return {params.block_indices + tile.index * params.max_blocks,
                params.block_counts[tile.index], params.max_blocks};
    }
    CONDENSATE_HOST_DEVICE int size() const {
        return static_cast<int>(min_i64(max_i64(claimed, 0), width));
    }
};

// Anchors, window and list merged. Invalid entries (negative, out of range, not ascending) are
// skipped and noted in `errors`.
class BlockWalk {
  public:
    struct Step {
        int block;     // INT_MAX at the end
        bool listed;   // every visible key of it is attended
        bool sampled;  // gap_stride() wants it; set for listed blocks only
    };

    CONDENSATE_HOST_DEVICE BlockWalk(const Ranges& ranges, TileSpan tile, const TileList& list)
        : list_(list.entries), size_(list.size()) {
        if (list.claimed < 0 || list.claimed > list.width) errors = kErrorBlockCount;
        num_blocks_ = static_cast<int>(num_blocks(ranges.kv_len));
        end_ = reachable_blocks(ranges, tile);
        BlockRange anchors = anchor_blocks(ranges, tile), window = window_blocks(ranges, tile);
        anchors_end_ = static_cast<int>(anchors.end);
        window_begin_ = static_cast<int>(max_i64(window.begin, anchors.end));
        window_end_ = static_cast<int>(window.end);
        advance_range(-1);
        advance_list();
    }

    CONDENSATE_HOST_DEVICE Step next() {
        const int block = next_range_ < next_list_ ? next_range_ : next_list_;
        if (block == INT_MAX) return {block, false, false};
        const bool listed = block == next_list_;
        const bool sampled = listed && to_sample_ == 0;
        if (block == next_range_) advance_range(block);
        if (listed) {
            to_sample_ = (sampled ? static_cast<int>(gap_stride(size_)) : to_sample_) - 1;
            advance_list();
        }
        return {block, listed, sampled};
    }

    uint32_t errors = 0;

  private:
    CONDENSATE_HOST_DEVICE void advance_range(int previous) {
        int block = previous + 1;
        if (block >= anchors_end_ && block < window_begin_) block = window_begin_;
        next_range_ = block < anchors_end_ || block < window_end_ ? block : INT_MAX;
    }

    CONDENSATE_HOST_DEVICE void advance_list() {
        next_list_ = INT_MAX;
        while (cursor_ < size_) {
            const int entry = list_[cursor_++];
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
    int size_, cursor_ = 0, last_entry_ = -1;
    int num_blocks_, end_;
    int anchors_end_, window_begin_, window_end_;
    int next_range_ = INT_MAX, next_list_ = INT_MAX;
};

// What a call's attention does: known to kernels when they are compiled.
struct AttentionKind {
    bool far_field;   // blocks are attended whole
    bool thresholds;  // judge single keys, so every visible block is scored
    bool estimates;   // the omitted mass, from sampled blocks
};

// The walk of one tile of an attention call, and what its rows attend of every block.
class AttentionWalk {
  public:
    struct Step {
        int block;     // INT_MAX at the end
        bool whole;    // every visible key of it is attended, also outside a row's window
        bool full;     // every row attends every key of it: there is no mask
        bool sampled;  // its Jensen gap counts
    };

    CONDENSATE_HOST_DEVICE AttentionWalk(const AttentionParams& params, const Tile& tile,
                                         AttentionKind kind)
        : kind_(kind),
          ranges_(tile.ranges(params.problem)),
          span_(tile.span()),
          walk_(kind.thresholds ? Ranges{tile.kv_len, 0, tile.kv_len, ranges_.causal} : ranges_,
                span_, kind.thresholds ? TileList{} : TileList::of(params, tile)) {}

    CONDENSATE_HOST_DEVICE Step next() {
        const BlockWalk::Step step = walk_.next();
        if (step.block == INT_MAX) return {step.block, false, false, false};
        const bool whole = step.listed || kind_.far_field;
        const bool full = !kind_.thresholds &&
                          block_cover(ranges_, span_, step.block, whole) == BlockCover::kFull;
        return {step.block, whole, full, kind_.estimates && step.sampled && full};
    }

    CONDENSATE_HOST_DEVICE uint32_t errors() const { return walk_.errors; }

  private:
    AttentionKind kind_;
    Ranges ranges_;
    TileSpan span_;
    BlockWalk walk_;
};

}  // namespace condensate
