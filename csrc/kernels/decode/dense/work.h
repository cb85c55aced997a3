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
    int32_t begin, end;  // keys of the split; begin < 0 behind the last item
};

// In shared memory, so that it takes no registers while an item is worked on.
struct WorkWalk {
    WorkItem item;
    int32_t row_tiles, tile_rows;
    int64_t next;            // index of the next item
    int32_t first_unit;      // (sequence, split)s of all sequences before first_sequence
    int32_t first_sequence;  // of 32 that are looked at together

    // One warp calls these; the others wait to see what it writes.
    __device__ void start(int tiles, int rows) {
        row_tiles = tiles;
        tile_rows = rows;
        next = blockIdx.x;
        first_unit = first_sequence = 0;
    }
    __device__ void step(const DecodeParams& params, uint32_t* error_word) {
        const int lane = threadIdx.x & 31;
        const int parts = static_cast<int>(params.kv_heads) * row_tiles;  // items of a unit
        const int unit = static_cast<int>(next / parts), part = static_cast<int>(next % parts);
        const Splits splits(params.kv_heads);
        int before = first_unit, sequence = first_sequence;
        __syncwarp();  // read by all lanes
        for (; sequence < params.batch; sequence += 32) {
            const int length = read_length(params, sequence + lane, error_word);
            int through = static_cast<int>(splits.count(length));  // of these sequences up to mine
            const int mine = through;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kAll, through, step);
                if (lane >= step) through += other;
            }
            const int local = unit - before;
            if (local < __shfl_sync(kAll, through, 31)) {
                const bool is_it = local < through && local >= through - mine;
                if (is_it) {
                    item.batch = sequence + lane;
                    item.kv_head = part / row_tiles;
                    item.first_row = part % row_tiles * tile_rows;
                    item.split = local - (through - mine);
                    item.length = length;
                    const int64_t keys = splits.keys(length), begin = item.split * keys;
                    item.begin = static_cast<int32_t>(begin);
                    item.end = static_cast<int32_t>(min_i64(begin + keys, length));
                    next += gridDim.x;
                    first_unit = before;
                    first_sequence = sequence;
                }
                return;
            }
            before += __shfl_sync(kAll, through, 31);
        }
        item.begin = -1;
    }

  private:
    static constexpr unsigned kAll = 0xffffffffu;

    __device__ static int read_length(const DecodeParams& params, int sequence,
                                      uint32_t* error_word) {
        if (sequence >= params.batch) return 0;
        bool clamped;
        const int64_t length = bounded_length(__ldg(params.cache.lengths + sequence),
                                              params.cache.capacity(), &clamped);
        if (clamped) atomicOr(error_word, kErrorCacheLength);
        return static_cast<int>(length);
    }
};

}  // namespace condensate::kernels::decode
