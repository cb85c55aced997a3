#include <cuda_runtime.h>

namespace condensate::kernels {
namespace {
alignas(128) char smem_bytes[emulate::kSharedBytes];
const emulate::SharedMemory registered(smem_bytes);
}  // namespace
}  // namespace condensate::kernels

#include "kernels/decode/common/update_summaries.cu"
