#include "cpu/kernels.h"
#include "reference/reference.h"
namespace condensate::cpu {
Status block_summaries(const BlockSummaryParams& p, const Executor&) {
    reference::block_summaries<float>(p);
    return {};
}
Status select_blocks(const BlockSelectParams& p, const Executor&) {
    reference::select_blocks<float>(p);
    return {};
}
Status select_tokens(const TokenSelectParams& p, const Executor&) {
    reference::select_tokens<float>(p);
    return {};
}
Status attention(const AttentionParams& p, const Executor&, uint32_t* errors) {
    reference::attention<float>(p, errors);
    return {};
}
Status omitted_mass(const OmittedMassParams& p, const Executor&, uint32_t* errors) {
    reference::omitted_mass<float>(p, errors);
    return {};
}
Status merge_states(const MergeStatesParams& p, const Executor&) {
    reference::merge_states<float>(p);
    return {};
}
}  // namespace condensate::cpu
