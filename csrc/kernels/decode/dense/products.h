// Scores and values of a warp's 16-key tile by mma.sync, of 16-bit tiles or 8-bit ones, which are
// converted after the load.
//
// An ldmatrix of 8-bit elements gives a lane four channels 4c..4c+3 of a key where mma wants 2c,
// 2c+1, 2c+8, 2c+9 (c = lane % 4): the queries are read in that order of channels instead. The
// transposed load of values gives two keys of two channels, so of each 16 channels one 8-column
// tile has the even ones and the next the odd ones.
#pragma once

#include "device/mma_tile.h"
#include "device/pack.h"
#include "device/softmax.h"
#include "kernels/decode/dense/traits.h"

namespace condensate::kernels::decode {

template <class Traits>
using QueryTiles = uint32_t[Traits::kKSteps][Traits::kMTiles][4];
template <class Traits>
using ScoreTiles = float[Traits::kMTiles][2][4];
template <class Traits>
using OutTiles = float[Traits::kMTiles][Traits::kDTiles][4];

// Channel of a lane's accumulator element out[m][n][2 * half + e].
template <class Traits>
__device__ __forceinline__ int out_channel(int n, int e) {
    const int c = threadIdx.x & 3;
    return Traits::kFloat8 ? n / 2 * 16 + 4 * c + 2 * e + n % 2 : 8 * n + 2 * c + e;
}

// What raw scores of a lane's rows are to be multiplied by.
template <class Traits>
using RowScales = float[Traits::kMTiles][2];

// The power of two that brings numbers of this size to [2^14, 2^15), and its inverse.
__device__ __forceinline__ float2 half_range(float largest) {
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
    const int shift = largest == 0.0f ? 0 : min(max(14 - exponent, -120), 120);
    return {__uint_as_float((127 + shift) << 23), __uint_as_float((127 - shift) << 23)};
}

// Queries for products with 8-bit keys, which are made in float16, the type that e4m3 converts to
// in one instruction: bfloat16 rows are brought into its range by a power of two.
template <class Traits>
__device__ __forceinline__ void to_half(QueryTiles<Traits>& q, bool from_half,
                                        RowScales<Traits>& scales) {
    auto floats = [&](uint32_t pair) {
        return from_half ? device::unpack2<__half>(pair) : device::unpack2<__nv_bfloat16>(pair);
    };
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = 0.0f;
#pragma unroll
            for (int k = 0; k < 2 * Traits::kKSteps; ++k) {
                const float2 x = floats(q[k / 2][m][half + k % 2 * 2]);
                largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
            }
            const float2 range = half_range(device::quad_max(largest));
            scales[m][half] = range.y;
#pragma unroll
            for (int k = 0; k < 2 * Traits::kKSteps; ++k) {
                uint32_t& pair = q[k / 2][m][half + k % 2 * 2];
                const float2 x = floats(pair);
                pair = device::pack2<__half>(x.x * range.x, x.y * range.x);
            }
        }
    }
}

// A lane's queries of rows first_row + lane / 4 + 8 * half + 16 * m as they are, zeros where
// row_of() is null. All 16-bit types are read alike.
template <class Traits, class RowOf>
__device__ __forceinline__ void load_queries(QueryTiles<Traits>& q, RowOf&& row_of) {
    const int c = threadIdx.x & 3;
    constexpr int kStep = Traits::kFloat8 ? 4 : 2, kRight = Traits::kFloat8 ? 2 : 8;
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint16_t* row = row_of(16 * m + 8 * half + (threadIdx.x & 31) / 4);
#pragma unroll
            for (int k = 0; k < Traits::kKSteps; ++k) {
                const auto* left = reinterpret_cast<const uint32_t*>(row + 16 * k + kStep * c);
                q[k][m][half] = row ? __ldg(left) : 0;
                q[k][m][2 + half] = row ? __ldg(left + kRight / 2) : 0;
            }
        }
    }
}

template <class Traits>
__device__ __forceinline__ void score_keys(ScoreTiles<Traits>& s, const QueryTiles<Traits>& q,
                                           uint32_t k_smem) {
    using T = typename Traits::T;
    if constexpr (!Traits::kFloat8) {
        device::clear_tile(s);
        const uint32_t lane = device::column_major_lane<Traits::kPitch>(k_smem, 0);
#pragma unroll
        for (int k = 0; k < Traits::kKSteps; ++k)
            device::score_step<T, Traits::kPitch>(s, q[k], lane, k);
    } else {
        device::clear_tile(s);
        const uint32_t lane = device::row_major_lane<Traits::kPitch>(k_smem, 0);
#pragma unroll
        for (int pair = 0; pair < Traits::kKSteps / 2; ++pair) {
            uint32_t four[4];  // (step 2 pair, keys 0-7), (.., 8-15), (step 2 pair + 1, ..)
            ptx::ldmatrix_x4(four, device::chunk_pair_address<Traits::kPitch>(lane, 0, pair));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t b0 = device::unpack_float8(four[i] & 0xffff);
                const uint32_t b1 = device::unpack_float8(four[i] >> 16);
#pragma unroll
                for (int m = 0; m < Traits::kMTiles; ++m)
                    ptx::mma_m16n8k16<T>(s[m][i % 2], q[2 * pair + i / 2][m], b0, b1);
            }
        }
    }
}

// out += weights * values, with the weights rounded to T.
template <class Traits>
__device__ __forceinline__ void add_values(OutTiles<Traits>& out, const ScoreTiles<Traits>& p,
                                           uint32_t v_smem) {
    using T = typename Traits::T;
    uint32_t a[Traits::kMTiles][4];
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[m][i] = device::pack2<T>(p[m][i / 2][i % 2 * 2], p[m][i / 2][i % 2 * 2 + 1]);
    }
    const uint32_t lane = device::row_major_lane<Traits::kPitch>(v_smem, 0);
    // 16-bit: b[2 i], b[2 i + 1] are channels 8 (2 pair + i). 8-bit: 16 (2 pair + i), two tiles.
#pragma unroll
    for (int pair = 0; pair < Traits::kChunks / 2; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, device::chunk_pair_address<Traits::kPitch>(lane, 0, pair));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (!Traits::kFloat8) {
#pragma unroll
                for (int m = 0; m < Traits::kMTiles; ++m)
                    ptx::mma_m16n8k16<T>(out[m][2 * pair + i], a[m], b[2 * i], b[2 * i + 1]);
            } else {
                // Bytes (key, channel): (0, even) (0, odd) (1, even) (1, odd).
                const uint32_t low = __byte_perm(b[2 * i], 0, 0x3120);
                const uint32_t high = __byte_perm(b[2 * i + 1], 0, 0x3120);
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const uint32_t b0 = device::unpack_float8(low >> 16 * odd & 0xffff);
                    const uint32_t b1 = device::unpack_float8(high >> 16 * odd & 0xffff);
#pragma unroll
                    for (int m = 0; m < Traits::kMTiles; ++m)
                        ptx::mma_m16n8k16<T>(out[m][2 * (2 * pair + i) + odd], a[m], b0, b1);
                }
            }
        }
    }
}

}  // namespace condensate::kernels::decode
