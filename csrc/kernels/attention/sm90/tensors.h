// The tensors of a call as the copy engine sees them.
#pragma once

#include <cuda.h>

namespace condensate::kernels::sm90 {

struct TensorMaps {
    CUtensorMap query, key, value, out;
    int box_heads;  // query heads of one box of `query` and `out`; they lie in one warpgroup's rows
};

}  // namespace condensate::kernels::sm90
