// The definition as plain loops: scalar, serial, templated on the type that sums are kept in
// (float or double). Nothing here is fast; everything else is tested against it.
// Parameters arrive validated. Invalid tensor contents are skipped and reported in *errors.
#pragma once

#include <cstdint>
#include <vector>

#include "condensate/decode.h"
#include "condensate/params.h"

namespace condensate::reference {

template <class Acc>
void block_summaries(const BlockSummaryParams& params);
template <class Acc>
void select_blocks(const BlockSelectParams& params);
template <class Acc>
void select_tokens(const TokenSelectParams& params);
template <class Acc>
void far_pools(const FarPoolsParams& params);
template <class Acc>
void attention(const AttentionParams& params, uint32_t* errors);
template <class Acc>
void omitted_mass(const OmittedMassParams& params, uint32_t* errors);
template <class Acc>
void omitted_from_lse(const OmittedFromLseParams& params);
template <class Acc>
void merge_states(const MergeStatesParams& params);

// Always in double, but for what decode.h rounds to 8 bits in float.
void update_kv_summaries(const UpdateSummariesParams& params, uint32_t* errors);
void attention_with_kvcache(const DecodeParams& params, uint32_t* errors);

// The valid entries of one list as a flag per block; faults are added to *errors.
std::vector<char> listed_blocks(const int32_t* indices, int32_t count, int64_t max_blocks,
                                int64_t blocks, uint32_t* errors);

}  // namespace condensate::reference
