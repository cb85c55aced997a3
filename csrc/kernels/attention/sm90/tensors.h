// The tensors of a call as TMA sees them.
#pragma once

#include <cuda.h>

#include "device/far_rows.h"

namespace condensate::kernels::sm90 {

struct TensorMaps {
    CUtensorMap query, key, value, out;
    CUtensorMap far_means;  // [2 (key, value), B * Hkv, P, D]; not set without a far field
    device::FarShape far;
    int box_heads;  // query heads of one box of `query` and `out`; they lie in one warpgroup's rows
};

}  // namespace condensate::kernels::sm90
