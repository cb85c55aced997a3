// Checks every parameter struct in one fixed order: sizes, heads, head_dim, ranges, scale, stage
// arguments, pointers. The first fault found is reported; its message names the argument, its
// value, what is allowed and the fix. No tensor content is read.
#pragma once

#include <string>

#include "condensate/params.h"

namespace condensate {

Status validate(const BlockSummaryParams& params);
Status validate(const BlockSelectParams& params);
Status validate(const TokenSelectParams& params);
Status validate(const FarPoolsParams& params);
Status validate(const AttentionParams& params);
Status validate(const OmittedMassParams& params);
Status validate(const OmittedFromLseParams& params);
Status validate(const MergeStatesParams& params);

// Single arguments, for callers whose parameter struct does not exist yet.

// `kv_name` is the tensor that has the KV heads.
Status validate_heads(const char* op, int64_t query_heads, const char* kv_name, int64_t kv_heads);
// Names of the selectors that list blocks, quoted, as in a sentence: "a", "b" or "c".
std::string block_selector_names();
// One that lists blocks.
Status validate_block_selector(const char* op, Selector selector);
// Positive where blocks are ranked; that it is finite is checked with the problem.
Status validate_ranking_scale(const char* op, float scale, Selector selector);
// A budget in keys: topk >= 0, and whole blocks for the block selectors.
Status validate_topk(const char* op, int64_t topk, Selector selector);
// A share of the mass in (0, 1]; `none` is what a caller passes who wants no such limit.
Status validate_top_p(const char* op, double top_p, const char* none);

}  // namespace condensate
