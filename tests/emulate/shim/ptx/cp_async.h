#pragma once

#include "cuda_runtime.h"

namespace condensate::ptx {

inline void cp_async_16(uint32_t dst_smem, const void* src_gmem, bool copy) {
    emulate::begin_copy(dst_smem, src_gmem, copy);
}
inline void cp_async_commit() { emulate::commit_copies(); }
template <int kPending>
void cp_async_wait() {
    emulate::wait_for_copies(kPending);
}

}  // namespace condensate::ptx
