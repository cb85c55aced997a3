#pragma once

#include "cuda_runtime.h"

namespace condensate::ptx {

inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float rcp_approx(float x) { return 1.0f / x; }

}  // namespace condensate::ptx
