#include <cuda_runtime.h>

namespace condensate::kernels::decode {
namespace {
alignas(128) uint8_t smem_bytes[emulate::kSharedBytes];
const emulate::SharedMemory registered(smem_bytes);
}  // namespace
}  // namespace condensate::kernels::decode

#include "kernels/decode/selected/list.cu"
