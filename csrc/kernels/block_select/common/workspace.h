// What lies where in the workspace of a selection, and how many CTAs share it.
#pragma once

#include "condensate/params.h"
#include "kernels/block_select/common/top_blocks.h"

namespace condensate::kernels::block_select {

inline int64_t all_tiles(const Problem& p) {
    return p.batch * p.kv_heads * num_tiles(p.query_len, p.group());
}
inline int64_t scan_tiles_per_head(const BlockSelectParams& params) {
    const Problem& p = params.problem;
    return num_scan_tiles(params.selector, p.query_len, p.group(), p.kv_len);
}
// Consecutive scan tiles of a KV head, one a warp.
inline int64_t scan_items(const BlockSelectParams& params) {
    const Problem& p = params.problem;
    return p.batch * p.kv_heads * ceil_div(scan_tiles_per_head(params), scan_warps(p.group()));
}
// Persistent CTAs of the scan and of the refinement, at most.
inline int64_t scan_ctas(const BlockSelectParams& params, int sm_count) {
    const Problem& p = params.problem;
    int dim = summary_dim(params.selector, static_cast<int>(p.head_dim));
    return min_i64(scan_items(params), int64_t{sm_count} * scan_ctas_per_sm(dim));
}
inline int64_t refine_ctas(const BlockSelectParams& params, int sm_count) {
    int dim = static_cast<int>(params.problem.head_dim);
    return min_i64(all_tiles(params.problem), int64_t{sm_count} * refine_ctas_per_sm(dim));
}

// Offsets in bytes. Where shortlists are refined, they and their counts; then the scan's
// candidates, which the refinement's masses replace.
struct Workspace {
    bool refines;
    int64_t width;     // of what the scan makes; no shortlist holds more blocks than there are
    int64_t capacity;  // of a warp's window of candidates
    int64_t indices = 0, counts = 0, scratch = 0, bytes = 0;

    Workspace(const BlockSelectParams& params, int sm_count) {
        const Problem& p = params.problem;
        const int64_t blocks = num_blocks(p.kv_len);
        const Refinement refinement = params.refinement();
        refines = refinement != Refinement::kNone;
        width = refines ? min_i64(shortlist_width(refinement, params.max_blocks), blocks)
                        : params.max_blocks;
        // A list that takes every block needs no candidates.
        const bool chooses = width < blocks || (params.head_keys && !refines);
        capacity = chooses ? TopBlocks::capacity_for(width) : 0;
        constexpr int64_t kWord = 4;
        if (refines) {
            const int64_t shortlists = p.batch * p.kv_heads * scan_tiles_per_head(params);
            counts = round_up(shortlists * width * kWord);
            scratch = counts + round_up(shortlists * kWord);
        }
        int64_t scan_bytes = scan_ctas(params, sm_count) * scan_warps(p.group()) * 2 * capacity;
        scan_bytes = capacity <= kSmemWindow ? 0 : scan_bytes * kWord;
        int64_t refine_bytes =
            refines ? refine_ctas(params, sm_count) * kRefineWarps * width * kWord : 0;
        bytes = scratch + max_i64(scan_bytes, refine_bytes);
    }

  private:
    static int64_t round_up(int64_t bytes) { return ceil_div(bytes, 256) * 256; }
};

}  // namespace condensate::kernels::block_select
