// Which stage of the ring a step uses, and which parity its barriers then have.
#pragma once

#include <cstdint>

namespace condensate::kernels::sm90 {

template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;  // of "full" in this round; "empty" waits for the other one

    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace condensate::kernels::sm90
