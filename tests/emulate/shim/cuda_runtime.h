// CUDA's device language in C++ for tests/emulate. Host types and conversions are the toolkit's.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include <math.h>
#include <string.h>
#include <vector_functions.h>

#include "emulate.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// Inlined, so that reports name the line of the kernel.
#define EMULATE_INLINE __attribute__((always_inline)) inline
#define EMULATE_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <class Call>
__attribute__((no_sanitize_thread)) void emulate_call(const void* call) {
    (*static_cast<const Call*>(call))();
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
    emulate::LaunchShape shape = {{config->gridDim.x, config->gridDim.y, config->gridDim.z},
                                  config->blockDim.x,
                                  static_cast<uint32_t>(config->dynamicSmemBytes),
                                  1};
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
            shape.cluster = config->attrs[i].val.clusterDim.x;
    auto call = [&]() __attribute__((no_sanitize_thread)) { kernel(args...); };
    emulate::run_grid(shape, &emulate_call<decltype(call)>, &call);
    return cudaSuccess;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

template <class T>
EMULATE_INLINE T __ldg(const T* address) {
    T x;
    emulate::load(&x, address, sizeof(T), alignof(T), emulate::Access::kReadConstant);
    return x;
}
template <class T>
EMULATE_INLINE T __ldcg(const T* address) {
    T x;
    emulate::load(&x, address, sizeof(T), alignof(T), emulate::Access::kReadPastL1);
    return x;
}

inline void __syncthreads(EMULATE_SITE) { emulate::sync_block({file, line}); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMULATE_SITE) {
    emulate::sync_warp(mask, {file, line});
}
inline void __threadfence() { emulate::fence(); }

struct WarpLanes {
    template <class T>
    static void all(T (&lanes)[32], uint32_t mask, T mine, emulate::Site site) {
        emulate::exchange(mask, &mine, sizeof(T), lanes, site);
    }
    static unsigned lane() { return threadIdx.x % 32; }
};
template <class T>
T __shfl_sync(uint32_t mask, T x, int from, EMULATE_SITE) {
    T lanes[32];
    WarpLanes::all(lanes, mask, x, {file, line});
    return lanes[from & 31];
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int bits, EMULATE_SITE) {
    return __shfl_sync(mask, x, static_cast<int>(WarpLanes::lane()) ^ bits, file, line);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, unsigned by, EMULATE_SITE) {
    const unsigned lane = WarpLanes::lane();
    return __shfl_sync(mask, x, static_cast<int>(lane < by ? lane : lane - by), file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, bool set, EMULATE_SITE) {
    bool lanes[32];
    WarpLanes::all(lanes, mask, set, {file, line});
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1 && lanes[i]) bits |= 1u << i;
    return bits;
}
inline bool __all_sync(uint32_t mask, bool set, EMULATE_SITE) {
    return __ballot_sync(mask, set, file, line) == mask;
}
inline bool __any_sync(uint32_t mask, bool set, EMULATE_SITE) {
    return __ballot_sync(mask, set, file, line) != 0;
}
template <class T>
T __reduce_add_sync(uint32_t mask, T x, EMULATE_SITE) {
    T lanes[32], sum = 0;
    WarpLanes::all(lanes, mask, x, {file, line});
    for (int i = 0; i < 32; ++i) sum += mask >> i & 1 ? lanes[i] : T{0};
    return sum;
}
template <class T>
T __reduce_max_sync(uint32_t mask, T x, EMULATE_SITE) {
    T lanes[32], most = x;
    WarpLanes::all(lanes, mask, x, {file, line});
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) most = max(most, lanes[i]);
    return most;
}

template <class T>
EMULATE_INLINE T emulate_atomic(T* address, T operand, emulate::Op op) {
    return static_cast<T>(emulate::atomic(address, static_cast<uint64_t>(operand), sizeof(T),
                                          std::is_signed_v<T>, op));
}
template <class T>
EMULATE_INLINE T atomicAdd(T* address, std::common_type_t<T> x) {
    return emulate_atomic(address, x, emulate::Op::kAdd);
}
template <class T>
EMULATE_INLINE T atomicMin(T* address, std::common_type_t<T> x) {
    return emulate_atomic(address, x, emulate::Op::kMin);
}
template <class T>
EMULATE_INLINE T atomicMax(T* address, std::common_type_t<T> x) {
    return emulate_atomic(address, x, emulate::Op::kMax);
}
template <class T>
EMULATE_INLINE T atomicOr(T* address, std::common_type_t<T> x) {
    return emulate_atomic(address, x, emulate::Op::kOr);
}

template <class To, class From>
To emulate_bits(From from) {
    To to;
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline uint32_t __float_as_uint(float x) { return emulate_bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulate_bits<float>(x); }
inline float __int_as_float(int32_t x) { return emulate_bits<float>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i)
        out |= static_cast<uint32_t>(both >> (8 * (select >> (4 * i) & 7)) & 0xff) << (8 * i);
    return out;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
