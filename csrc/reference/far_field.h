// The far field as a tile sees it: docs/definition.md, "Far field".
#pragma once

#include <cstdint>
#include <vector>

#include "condensate/params.h"

namespace condensate::reference {

// One term of the softmax: the mean key and value over a pool's condensed keys, rounded to dtype.
struct CondensedPool {
    std::vector<float> key, value;
    int64_t keys = 0;
};

// The pools of a tile that condense any block; `walked` is a flag per block.
template <class Acc>
std::vector<CondensedPool> condense(const AttentionParams& params, int64_t b, int64_t kv_head,
                                    TileSpan span, const std::vector<char>& walked);

}  // namespace condensate::reference
