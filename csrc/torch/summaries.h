// Summaries of a call's keys or values in memory of its own.
#pragma once

#include "condensate/condensate.h"
#include "torch/tensor_args.h"

namespace condensate::ops {

inline int64_t summary_elements(const Problem& p, Selector selector) {
    return p.batch * p.kv_heads * summary_rows(selector, p.kv_len) *
           summary_dim(selector, static_cast<int>(p.head_dim));
}

// `rows`: the call's key or value; `summaries` holds summary_elements.
inline void make_summaries(const Problem& p, Selector selector, const ConstTensor4& rows,
                           void* summaries, const Executor& executor) {
    BlockSummaryParams params;
    set_key_sizes(p, &params);
    params.selector = selector;
    params.key = rows;
    params.summaries = summaries;
    check_status(condensate::block_summaries(params, executor));
}

}  // namespace condensate::ops
