// Thresholds that were measured and that kernels need to know; those of the host alone are in
// host/tuning.h. docs/ablations.md has the measurements.
#pragma once

#include <cstdint>

namespace condensate {

constexpr int64_t kScanKeys = 262144;  // up to so many keys every tile has a scan of its own

}  // namespace condensate
