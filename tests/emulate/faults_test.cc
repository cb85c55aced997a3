// The emulator finds the faults that it is for.
#include "faults.h"

#include <gtest/gtest.h>

namespace emulate {
namespace {

std::string found(Fault fault) {
    std::vector<int> data(64 + 8);
    for (int i = 0; i < 64; ++i) data[static_cast<size_t>(i)] = i;
    add_memory(data.data(), 64 * sizeof(int), "data", false);
    run_faulty(data.data(), fault);
    remove_memory(data.data());
    std::string all;
    for (const std::string& line : take_reports()) all += line + "\n";
    if (fault == Fault::kNone) {
        EXPECT_EQ(data[0], 1);
    }
    return all;
}

TEST(Emulate, FindsNothingInASoundKernel) { EXPECT_EQ(found(Fault::kNone), ""); }

TEST(Emulate, FindsFaults) {
    const std::pair<Fault, const char*> kFaults[] = {
        {Fault::kNoBarrier, "without a barrier between"},
        {Fault::kDivergentBarrier, "__syncthreads of one CTA"},
        {Fault::kMissingLane, "has left"},
        {Fault::kOutOfBounds, "out of bounds"},
        {Fault::kOutOfSharedMemory, "shared memory: out of bounds"},
    };
    for (const auto& [fault, message] : kFaults)
        EXPECT_NE(found(fault).find(message), std::string::npos)
            << message << " is not in: " << found(fault);
}

}  // namespace
}  // namespace emulate
