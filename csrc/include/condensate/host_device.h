// Marks functions that compile for the host and, under nvcc, for the device too.
#pragma once

#if defined(__CUDACC__)
#define CONDENSATE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CONDENSATE_HOST_DEVICE inline
#endif
