// Which keys of a partially attended step a row keeps, as one bit per key.
#pragma once

#include <cstdint>

#include "condensate/geometry.h"

namespace condensate::device {

// Bits [begin, end) after clamping both to [0, 64].
__device__ __forceinline__ uint64_t bit_range(int64_t begin, int64_t end) {
    int first = static_cast<int>(min_i64(max_i64(begin, 0), 64));
    int last = static_cast<int>(min_i64(max_i64(end, 0), 64));
    uint64_t below_last = last == 64 ? ~0ull : (1ull << last) - 1;
    uint64_t below_first = first == 64 ? ~0ull : (1ull << first) - 1;
    return below_last & ~below_first;
}

// Bit i: may a row at `position` attend key key_begin + i?
__device__ __forceinline__ uint64_t visible_bits(const Ranges& r, int64_t position,
                                                 int64_t key_begin) {
    return bit_range(0, (r.causal ? min_i64(position + 1, r.kv_len) : r.kv_len) - key_begin);
}

// Bit i: is key key_begin + i an anchor or in the row's window? To be combined with visible_bits.
__device__ __forceinline__ uint64_t range_bits(const Ranges& r, int64_t position,
                                               int64_t key_begin) {
    return bit_range(0, r.anchors - key_begin) |
           bit_range(position - r.window + 1 - key_begin, position + r.window - key_begin);
}

}  // namespace condensate::device
