#include <cuda_runtime.h>

#include "kernels/decode/decode.cu"
#include "kernels/decode/dense/by_bfloat16.cu"
#include "kernels/decode/dense/by_float16.cu"
#include "kernels/decode/dense/by_float8.cu"
#include "kernels/decode/dense/decode_dense.cu"
