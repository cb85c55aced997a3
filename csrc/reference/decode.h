// What the decoding stages of the reference share: a sequence of a cache, and rows of 8 bits.
#pragma once

#include <cstdint>
#include <vector>

#include "condensate/decode.h"
#include "host/number.h"

namespace condensate::reference {

// Keys and values of one sequence. Faults of its length and its pages are added to *errors.
class CachedSequence {
  public:
    CachedSequence(const KvCache& cache, int64_t batch_index, uint32_t* errors);

    int64_t length() const { return length_; }
    // Physical page of a key, or -1 where the table has none.
    int64_t page_of(int64_t key) const;
    int64_t slot_of(int64_t key) const { return key % cache_.page_size; }

    // Element d as it is stored, without the scale of an 8-bit cache.
    float stored_key(int64_t kv_head, int64_t key, int64_t d) const;
    float stored_value(int64_t kv_head, int64_t key, int64_t d) const;
    float key_scale(int64_t kv_head) const;
    float value_scale(int64_t kv_head) const;

  private:
    const KvCache& cache_;
    int64_t batch_index_;
    uint32_t* errors_;
    int64_t length_ = 0;
};

// A row rounded to 8 bits: element = entries[d] * scale.
struct RoundedRow {
    std::vector<int8_t> entries;
    float scale = 0;
};
RoundedRow round_row(const std::vector<float>& row);

}  // namespace condensate::reference
