// The summaries as TMA sees them: [heads, blocks, rows of a block, channels], in boxes
// of one level's units.
#pragma once

#include <cuda.h>

namespace condensate::kernels::block_select {

struct UnitMaps {
    CUtensorMap coarse_chunk, short_chunk;  // 64 units of consecutive blocks
    CUtensorMap short_block;                // the units of one block
};
struct NoMaps {};  // of kernels that load with cp.async

}  // namespace condensate::kernels::block_select
