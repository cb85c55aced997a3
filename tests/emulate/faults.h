#pragma once

#include "emulate.h"

namespace emulate {

enum class Fault {
    kNone,
    kNoBarrier,
    kDivergentBarrier,
    kMissingLane,
    kOutOfBounds,
    kOutOfSharedMemory,
};
// Moves 64 numbers by one place.
void run_faulty(int* data, Fault fault);

}  // namespace emulate
