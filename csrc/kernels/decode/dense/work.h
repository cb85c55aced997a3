// The work items of dense decoding: (sequence, split) by KV head by tile of rows, counted on the
// device from the lengths. CTAs stride over them.
#pragma once

#include "condensate/decode.h"
#include "kernels/decode/dense/splits.h"

namespace condensate::kernels::decode {

struct WorkItem {
    int32_t batch, kv_head, first_row;
    int32_t split;
    int32_t length;      // of the sequence
    int32_t begin, end;  // keys of the split
};

// A whole warp steps along together.
class WorkWalk {
  public:
    __device__ WorkWalk(const DecodeParams& params, int row_tiles, int tile_rows)
        : params_(params),
          parts_(static_cast<int>(params.kv_heads) * row_tiles),
          row_tiles_(row_tiles),
          tile_rows_(tile_rows) {}

    // The item `index`, which only grows; false behind the last.
    __device__ bool find(int64_t index, WorkItem* item, uint32_t* errors) {
        const int unit = static_cast<int>(index / parts_), part = static_cast<int>(index % parts_);
        for (; first_sequence_ < params_.batch; first_sequence_ += 32) {
            const int length = read_length(errors);
            int through = static_cast<int>(num_splits(length));  // splits of sequences up to mine
            const int lane = threadIdx.x & 31;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kAll, through, step);
                if (lane >= step) through += other;
            }
            const int local = unit - first_unit_, total = __shfl_sync(kAll, through, 31);
            if (local < total) {
                const int found = __popc(__ballot_sync(kAll, through <= local));
                const int before = __shfl_sync(kAll, through, max(found - 1, 0));
                item->batch = first_sequence_ + found;
                item->kv_head = part / row_tiles_;
                item->first_row = part % row_tiles_ * tile_rows_;
                item->length = __shfl_sync(kAll, length, found);
                item->split = local - (found > 0 ? before : 0);
                const int64_t keys = split_keys(item->length);
                item->begin = static_cast<int32_t>(item->split * keys);
                item->end = static_cast<int32_t>(min_i64(item->begin + keys, item->length));
                return true;
            }
            first_unit_ += total;
        }
        return false;
    }

  private:
    static constexpr unsigned kAll = 0xffffffffu;

    // Of sequence first_sequence_ + lane.
    __device__ int read_length(uint32_t* errors) const {
        const int sequence = first_sequence_ + static_cast<int>(threadIdx.x & 31);
        if (sequence >= params_.batch) return 0;
        bool clamped;
        const int64_t length = bounded_length(__ldg(params_.cache.lengths + sequence),
                                              params_.cache.capacity(), &clamped);
        if (clamped) *errors |= kErrorCacheLength;
        return static_cast<int>(length);
    }

    const DecodeParams& params_;
    const int parts_;  // items of a (sequence, split)
    const int row_tiles_, tile_rows_;
    int32_t first_unit_ = 0;      // (sequence, split)s of all sequences before first_sequence_
    int32_t first_sequence_ = 0;  // of 32 whose lengths are looked at together
};

}  // namespace condensate::kernels::decode
