// The pipeline steps of a tile's blocks.
#pragma once

#include "condensate/block_walk.h"

namespace condensate::kernels::sm80 {

// The keys of one pipeline step.
struct Step {
    int64_t key_begin;  // negative at the end
    bool partial;       // the mask must be evaluated
    bool whole;
    bool sampled;  // for the estimate of the omitted mass
};

// Cuts the walk's blocks into steps of kStepKeys keys.
template <class Traits>
class StepWalk {
  public:
    __device__ StepWalk(const AttentionParams& params, const Tile& tile)
        : walk_(params, tile,
                {Traits::kFar, Traits::kExact,
                 Traits::kEstimates && params.omitted_mass_estimate != nullptr}) {}

    __device__ Step next() {
        if (Traits::kStepKeys == kBlockKeys || key_ % kBlockKeys == 0) {
            block_ = walk_.next();
            if (block_.block == INT_MAX) return {-1, false, false, false};
            key_ = int64_t{block_.block} * kBlockKeys;
        }
        Step step = {key_, !block_.full, block_.whole, block_.sampled};
        key_ += Traits::kStepKeys;
        return step;
    }
    __device__ uint32_t errors() const { return walk_.errors(); }

  private:
    AttentionWalk walk_;
    AttentionWalk::Step block_;
    int64_t key_ = 0;
};

}  // namespace condensate::kernels::sm80
