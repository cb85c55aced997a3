// The tables of the stages, each defined in the file of its name.
#pragma once

#include "condensate/decode.h"
#include "host/stage.h"

namespace condensate {

const StageTable<BlockSummaryParams>& table_of(const BlockSummaryParams&);
const StageTable<BlockSelectParams>& table_of(const BlockSelectParams&);
const StageTable<TokenSelectParams>& table_of(const TokenSelectParams&);
const StageTable<FarPoolsParams>& table_of(const FarPoolsParams&);
const StageTable<AttentionParams>& table_of(const AttentionParams&);
const StageTable<OmittedMassParams>& table_of(const OmittedMassParams&);
const StageTable<OmittedFromLseParams>& table_of(const OmittedFromLseParams&);
const StageTable<MergeStatesParams>& table_of(const MergeStatesParams&);
const StageTable<DecodeParams>& table_of(const DecodeParams&);
const StageTable<UpdateSummariesParams>& table_of(const UpdateSummariesParams&);

// Anchors and window of a full row, at most.
int64_t range_keys(const Problem& problem, bool far_field);

}  // namespace condensate
