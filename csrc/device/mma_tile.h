// Scores of a warp's query rows against a tile of keys. Every kernel that scores keys calls this,
// so a score is the same float wherever it is computed: one accumulator per element, started at 0,
// channels ascending in steps of 16.
#pragma once

#include "device/smem_tile.h"
#include "ptx/matrix.h"

namespace condensate::device {

// acc[m][n] is the 16x8 tile of rows row + 16 m and keys 8 n; a lane holds rows lane/4 and
// lane/4 + 8, keys 2 * (lane % 4) and + 1.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void clear_tile(float (&acc)[kMTiles][kNTiles][4]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
}

// One step of 16 channels: acc += a * keys^T.
template <class T, int kDim, int kMTiles, int kNTiles>
__device__ __forceinline__ void score_step(float (&acc)[kMTiles][kNTiles][4],
                                           const uint32_t (&a)[kMTiles][4], uint32_t k_lane,
                                           int k_step) {
    static_assert(kNTiles % 2 == 0, "keys are loaded 16 at a time");
#pragma unroll
    for (int pair = 0; pair < kNTiles / 2; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, chunk_pair_address<kDim>(k_lane, 16 * pair, k_step));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            ptx::mma_m16n8k16<T>(acc[m][2 * pair], a[m], b[0], b[1]);
            ptx::mma_m16n8k16<T>(acc[m][2 * pair + 1], a[m], b[2], b[3]);
        }
    }
}

// Queries in shared memory.
template <class T, int kDim, int kMTiles, int kNTiles>
__device__ __forceinline__ void score_tile(float (&acc)[kMTiles][kNTiles][4], uint32_t q_smem,
                                           int row, uint32_t k_smem) {
    clear_tile(acc);
    uint32_t q_lane = row_major_lane<kDim>(q_smem, row);
    uint32_t k_lane = column_major_lane<kDim>(k_smem, 0);
#pragma unroll
    for (int k_step = 0; k_step < kDim / 16; ++k_step) {
        uint32_t a[kMTiles][4];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
            ptx::ldmatrix_x4(a[m], chunk_pair_address<kDim>(q_lane, 16 * m, k_step));
        score_step<T, kDim>(acc, a, k_lane, k_step);
    }
}

// Queries held in registers by load_a_tiles().
template <class T, int kDim, int kMTiles, int kNTiles>
__device__ __forceinline__ void score_tile(float (&acc)[kMTiles][kNTiles][4],
                                           const uint32_t (&a)[kDim / 16][kMTiles][4],
                                           uint32_t k_smem) {
    clear_tile(acc);
    uint32_t k_lane = column_major_lane<kDim>(k_smem, 0);
#pragma unroll
    for (int k_step = 0; k_step < kDim / 16; ++k_step)
        score_step<T, kDim>(acc, a[k_step], k_lane, k_step);
}

template <int kDim, int kMTiles>
__device__ __forceinline__ void load_a_tiles(uint32_t (&a)[kDim / 16][kMTiles][4], uint32_t q_smem,
                                             int row) {
    uint32_t q_lane = row_major_lane<kDim>(q_smem, row);
#pragma unroll
    for (int k_step = 0; k_step < kDim / 16; ++k_step)
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
            ptx::ldmatrix_x4(a[k_step][m], chunk_pair_address<kDim>(q_lane, 16 * m, k_step));
}

}  // namespace condensate::device
