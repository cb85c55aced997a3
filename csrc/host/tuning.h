// Thresholds that were measured, of the host alone. docs/ablations.md has the measurements.
#pragma once

#include <cstdint>

#include "condensate/selectors.h"

namespace condensate {

// Is attending to everything at least as fast as selecting? Measured on Hopper: when an average row
// sees at most a quarter more keys than it would attend. Short contexts, where launches are all
// that counts, select as they are told.
constexpr int64_t kDenseFromKeys = 1024;
inline bool dense_is_faster(const Ranges& r, int64_t query_len, int64_t topk, Selector selector) {
    if (!selector_traits(selector).lists_blocks || r.kv_len < kDenseFromKeys) return false;
    const int64_t attended = r.anchors + (r.causal ? r.window : 2 * r.window) + topk;
    const int64_t seen = r.causal ? r.kv_len - min_i64(query_len, r.kv_len) / 2 : r.kv_len;
    return 4 * seen <= 5 * attended;
}

}  // namespace condensate
