// The blocks that a tile has to visit, ascending and each once: those with anchors, those in some
// row's window, and the listed ones.
#pragma once

#include "condensate/far_field.h"
#include "condensate/types.h"

namespace condensate::cpu {

class BlockWalk {
  public:
    BlockWalk(BlockRange anchors, BlockRange window) : anchors_(anchors), window_(window) {}

    // Adds a list as the caller gave it. Invalid contents are skipped and set bits in *errors.
    void set_list(const int32_t* indices, int64_t count, int64_t width, int64_t blocks,
                  uint32_t* errors) {
        if (count < 0 || count > width) *errors |= kErrorBlockCount;
        list_ = indices;
        list_end_ = indices + max_i64(0, min_i64(count, width));
        blocks_ = blocks;
        errors_ = errors;
        gap_stride_ = gap_stride(list_end_ - list_);
        skip_invalid();
    }

    struct Step {
        int64_t block;
        bool listed;
        bool sampled;  // gap_stride() wants it; set for listed blocks only
    };
    // The next block, or false at the end.
    bool next(Step* step) {
        int64_t block = kEnd;
        if (anchors_.begin < anchors_.end) block = min_i64(block, anchors_.begin);
        if (window_.begin < window_.end) block = min_i64(block, window_.begin);
        if (list_ != list_end_) block = min_i64(block, *list_);
        if (block == kEnd) return false;
        const bool listed = list_ != list_end_ && *list_ == block;
        *step = {block, listed, listed && walked_entries_ % gap_stride_ == 0};
        if (anchors_.begin == block) ++anchors_.begin;
        if (window_.begin == block) ++window_.begin;
        if (step->listed) {
            previous_ = block;
            ++walked_entries_;
            ++list_;
            skip_invalid();
        }
        return true;
    }

  private:
    static constexpr int64_t kEnd = INT64_MAX;

    void skip_invalid() {
        while (list_ != list_end_ && (*list_ <= previous_ || *list_ >= blocks_)) {
            *errors_ |= kErrorBlockIndex;
            ++list_;
        }
    }

    BlockRange anchors_;
    BlockRange window_;
    const int32_t* list_ = nullptr;
    const int32_t* list_end_ = nullptr;
    int64_t blocks_ = 0;
    int64_t previous_ = -1;
    int64_t gap_stride_ = 1, walked_entries_ = 0;
    uint32_t* errors_ = nullptr;
};

}  // namespace condensate::cpu
