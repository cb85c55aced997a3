// Checks every parameter struct in one fixed order: sizes, heads, head_dim, ranges, scale, stage
// arguments, pointers. The first fault found is reported; its message names the argument, its
// value, what is allowed and the fix. No tensor content is read.
#pragma once

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

// The budget of a call in keys: topk >= 0, and whole blocks for the block selectors.
Status validate_budget(int64_t topk, Selector selector);

}  // namespace condensate
