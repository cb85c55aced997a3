// Fills RowMask for one 64-key block from the definition's ranges.
#pragma once

#include "cpu/query_rows.h"

namespace condensate::cpu {

inline int32_t clamp_to_tile(int64_t key) {
    return static_cast<int32_t>(max_i64(0, min_i64(key, kTileKeys)));
}

// `listed`: every visible key of the block is attended. `threshold` and `tie_index`, which may be
// null, are [rows] and select keys by score.
inline void fill_mask(const Ranges& r, const QueryRows& rows, int64_t block, bool listed,
                      const float* threshold, const int32_t* tie_index, RowMask* mask) {
    const int64_t begin = block * kBlockKeys;
    const int32_t free_end = listed ? kTileKeys : clamp_to_tile(r.anchors - begin);
    for (int row = 0; row < rows.panel_count() * kPanelRows; ++row) {
        bool exists = row < rows.count;
        int64_t p = exists ? rows.position[row] : 0;
        int64_t visible = r.causal ? min_i64(p + 1, r.kv_len) : r.kv_len;
        mask->visible_end[row] = exists ? clamp_to_tile(visible - begin) : 0;
        mask->free_end[row] = free_end;
        mask->window_begin[row] = clamp_to_tile(p - r.window + 1 - begin);
        mask->window_end[row] = clamp_to_tile(p + (r.causal ? 1 : r.window) - begin);
        bool by_score = exists && threshold != nullptr;
        mask->threshold[row] = by_score ? threshold[row] : __builtin_inff();
        mask->tie_end[row] = by_score ? clamp_to_tile(int64_t{tie_index[row]} + 1 - begin) : 0;
    }
}

}  // namespace condensate::cpu
