#pragma once

#include "cuda_runtime.h"

namespace condensate::ptx {

inline void cluster_sync(EMULATE_SITE) { emulate::sync_cluster({file, line}); }

}  // namespace condensate::ptx
