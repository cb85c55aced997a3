#pragma once

#include "cuda_runtime.h"

namespace condensate::ptx {

constexpr bool kHasClusters = true;

inline void cluster_sync(EMULATE_SITE) { emulate::sync_cluster({file, line}); }

template <class T>
EMULATE_INLINE T load_peer(const T* mine, uint32_t rank) {
    T x;
    emulate::load_peer(&x, mine, sizeof(T), rank);
    return x;
}

}  // namespace condensate::ptx
