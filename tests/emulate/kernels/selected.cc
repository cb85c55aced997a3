#include <cuda_runtime.h>

namespace condensate::kernels::decode {  // of this file's kernels and of dense.cc's
alignas(128) uint8_t smem_bytes[emulate::kSharedBytes];
namespace {
const emulate::SharedMemory registered(smem_bytes);
}  // namespace
}  // namespace condensate::kernels::decode

#include "kernels/decode/selected/by_bfloat16.cu"
#include "kernels/decode/selected/by_bfloat16_e4m3.cu"
#include "kernels/decode/selected/by_float16.cu"
#include "kernels/decode/selected/by_float16_e4m3.cu"
