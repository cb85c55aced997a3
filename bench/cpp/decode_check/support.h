// What the checks share: errors, random numbers, elements, device buffers, the launch context.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "condensate/decode.h"
#include "kernels/decode/kernels.h"

namespace condensate::bench {

inline void check(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    std::printf("line %d: %s\n", line, cudaGetErrorString(error));
    std::exit(1);
}
#define CHECK(call) check((call), __LINE__)

inline uint32_t g_state = 1;
inline float uniform() {  // in [-1, 1)
    g_state = g_state * 1664525u + 1013904223u;
    return static_cast<int32_t>(g_state) / 2147483648.0f;
}
inline float normal() { return 1.2f * (uniform() + uniform() + uniform()); }

inline int bytes_of(DType t) { return t == DType::kFloat32 ? 4 : t == DType::kFloat8E4M3 ? 1 : 2; }
inline void put(DType t, void* data, int64_t i, float x) {
    if (t == DType::kFloat16) static_cast<__half*>(data)[i] = __float2half(x);
    if (t == DType::kBFloat16) static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(x);
    if (t == DType::kFloat8E4M3) static_cast<__nv_fp8_e4m3*>(data)[i] = __nv_fp8_e4m3(x);
}
inline float get(DType t, const void* data, int64_t i) {
    if (t == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
    if (t == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<float>(static_cast<const __nv_fp8_e4m3*>(data)[i]);
}

// Device memory with a host copy.
struct Buffer {
    std::vector<char> host;
    char* device = nullptr;
    explicit Buffer(int64_t bytes) : host(bytes) { CHECK(cudaMalloc(&device, bytes + 16)); }
    ~Buffer() { cudaFree(device); }
    Buffer(const Buffer&) = delete;
    void up() { CHECK(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice)); }
    void down() { CHECK(cudaMemcpy(host.data(), device, host.size(), cudaMemcpyDeviceToHost)); }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(host.data());
    }
};

constexpr DType kF16 = DType::kFloat16, kBF16 = DType::kBFloat16, kF8 = DType::kFloat8E4M3;

inline kernels::LaunchContext make_context() {
    kernels::LaunchContext context;
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    context.sm_count = prop.multiProcessorCount;
    context.sm_major = prop.major;
    context.max_smem_per_block_bytes = static_cast<int>(prop.sharedMemPerBlockOptin);
    CHECK(cudaMalloc(&context.error_word, 4));
    CHECK(cudaMemset(context.error_word, 0, 4));
    CHECK(cudaStreamCreate(&context.stream));
    return context;
}
inline uint32_t take_errors(const kernels::LaunchContext& context) {
    uint32_t word = 0;
    CHECK(cudaStreamSynchronize(context.stream));
    CHECK(cudaMemcpy(&word, context.error_word, 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemset(context.error_word, 0, 4));
    return word;
}
inline bool expect_ok(const Status& status) {
    if (!status.ok()) std::printf("  %s\n", status.message);
    return status.ok();
}

// Of all cases against the host; the number that failed.
int check_all(const kernels::LaunchContext& context);
// Prints the times of all cases by replays of CUDA graphs.
void time_all(const kernels::LaunchContext& context);

}  // namespace condensate::bench
