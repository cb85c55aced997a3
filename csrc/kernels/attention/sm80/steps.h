// The pipeline steps of a tile's blocks.
#pragma once

#include "condensate/params.h"
#include "device/block_walk.h"

namespace condensate::kernels::sm80 {

// The keys of one pipeline step.
struct Step {
    int64_t key_begin;  // negative at the end
    bool partial;       // the mask must be evaluated
    bool listed;
    bool sampled;  // for the estimate of the omitted mass
};

// Cuts the walk's blocks into steps of kStepKeys keys.
template <class Traits>
class StepWalk {
  public:
    // `samples`: the estimate is wanted.
    __device__ StepWalk(const Ranges& ranges, TileSpan tile, const device::BlockWalk& walk,
                        bool samples)
        : ranges_(ranges), tile_(tile), walk_(walk), samples_(samples) {}

    __device__ Step next() {
        if (key_ % kBlockKeys == 0) {
            device::BlockStep block = walk_.next();
            if (block.block == INT_MAX) return {-1, false, false, false};
            key_ = int64_t{block.block} * kBlockKeys;
            listed_ = block.listed || Traits::kFar;  // with the far field, blocks are whole
            partial_ = Traits::kExact ||
                       block_cover(ranges_, tile_, block.block, listed_) != BlockCover::kFull;
            if (Traits::kEstimates) sampled_ = samples_ && block.sampled && !partial_;
        }
        Step step = {key_, partial_, listed_, sampled_};
        key_ += Traits::kStepKeys;
        return step;
    }
    __device__ uint32_t errors() const { return walk_.errors; }

  private:
    Ranges ranges_;
    TileSpan tile_;
    device::BlockWalk walk_;
    int64_t key_ = 0;
    bool listed_ = false, partial_ = false, sampled_ = false;
    const bool samples_;
};

}  // namespace condensate::kernels::sm80
