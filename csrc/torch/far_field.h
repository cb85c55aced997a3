// The far field of one call: what it needs beside the lists, and the stages that make it.
#pragma once

#include "condensate/params.h"
#include "torch/scratch.h"

namespace condensate::ops {

// The mean rows among the summaries that `block` and `mean` select by; none for `quest`.
BlockMeans means_among(Selector selector, const void* summaries, const Problem& problem);

class FarFieldStages {
  public:
    // `makes_key_means`: no summaries of the call hold them.
    FarFieldStages(const Problem& problem, bool makes_key_means);

    int64_t bytes() const { return layout_.bytes(); }

    // Runs the stages in `memory` of bytes() and lets `attention`, whose tensors are set, use the
    // result. `key_means` are not read where they are made here.
    void run(void* memory, BlockMeans key_means, const Executor& executor,
             AttentionParams* attention) const;

  private:
    Problem problem_;
    bool makes_key_means_;
    Layout layout_;
    int64_t key_means_ = 0, value_means_ = 0, sums_ = 0, means_ = 0;  // offsets in bytes
};

}  // namespace condensate::ops
