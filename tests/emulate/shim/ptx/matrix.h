#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_runtime.h"

namespace condensate::ptx {

inline uint32_t smem_address(const void* pointer) { return emulate::smem_offset(pointer); }

inline void store_smem_16(uint32_t dst_smem, uint4 v) {
    emulate::store(emulate::smem_pointer(dst_smem), &v, 16, 16);
}

template <bool kTransposed>
void load_matrices(uint32_t (&d)[4], uint32_t row_smem, emulate::Site site) {
    struct RowOf8 {
        uint16_t element[8];
    } row, rows[32];
    emulate::load(&row, emulate::smem_pointer(row_smem), 16, 16, emulate::Access::kRead);
    WarpLanes::all(rows, 0xffffffffu, row, site);
    const unsigned lane = WarpLanes::lane(), r = lane / 4, c = 2 * (lane % 4);
    for (unsigned m = 0; m < 4; ++m) {
        const RowOf8* of = rows + 8 * m;
        d[m] = kTransposed ? of[c].element[r] | uint32_t{of[c + 1].element[r]} << 16
                           : of[r].element[c] | uint32_t{of[r].element[c + 1]} << 16;
    }
}
inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_smem, EMULATE_SITE) {
    load_matrices<false>(d, row_smem, {file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row_smem, EMULATE_SITE) {
    load_matrices<true>(d, row_smem, {file, line});
}

struct Operands {  // of a lane: four registers of A, two of B
    uint32_t a[4], b[2];
};
// sum over k of A[row][k] * B[k][column]; `get` takes a register's element as a number.
template <int kPerWord, class Sum, class Get>
Sum multiply_lanes(const Operands (&lanes)[32], unsigned row, unsigned column, Get&& get) {
    Sum sum = 0;
    for (unsigned half = 0; half < 2; ++half)
        for (unsigned t = 0; t < 4; ++t)
            for (unsigned e = 0; e < kPerWord; ++e)
                sum += get(lanes[4 * (row % 8) + t].a[2 * half + row / 8], e) *
                       get(lanes[4 * column + t].b[half], e);
    return sum;
}
inline double half_of(uint32_t word, unsigned e, __half) {
    const __half_raw raw = {static_cast<uint16_t>(word >> (16 * e))};
    return __half2float(__half(raw));
}
inline double half_of(uint32_t word, unsigned e, __nv_bfloat16) {
    return __uint_as_float(word >> (16 * e) << 16);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATE_SITE) {
    Operands lanes[32];
    WarpLanes::all(lanes, 0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, {file, line});
    const unsigned lane = WarpLanes::lane();
    for (unsigned i = 0; i < 4; ++i)
        c[i] = static_cast<float>(
            c[i] + multiply_lanes<2, double>(
                       lanes, lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2,
                       [](uint32_t word, unsigned e) { return half_of(word, e, T{}); }));
}
inline void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                            EMULATE_SITE) {
    Operands lanes[32];
    WarpLanes::all(lanes, 0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, {file, line});
    const unsigned lane = WarpLanes::lane();
    for (unsigned i = 0; i < 4; ++i)
        c[i] += multiply_lanes<4, int32_t>(
            lanes, lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2, [](uint32_t word, unsigned e) {
                return static_cast<int32_t>(static_cast<int8_t>(word >> (8 * e)));
            });
}

}  // namespace condensate::ptx
