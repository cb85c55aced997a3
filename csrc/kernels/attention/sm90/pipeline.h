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

// The same for a thread that has no register for every ring: steps passed, modulo the round in
// which all stages and parities come back.
template <int kKeyStages, int kValueStages>
struct StepCount {
    static constexpr int kRound = 2 * kKeyStages * kValueStages;
    int count = 0;

    __device__ void advance(int steps) { count = (count + steps) % kRound; }
    template <int kStages>
    __device__ Ring<kStages> ring() const {
        return {count % kStages, static_cast<uint32_t>(count / kStages & 1)};
    }
};

}  // namespace condensate::kernels::sm90
