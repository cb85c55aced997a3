// Tiles of 16-bit elements in shared memory, swizzled so that ldmatrix and 16-byte stores of eight
// consecutive rows touch all banks once: 16-byte chunk c of row r lies at chunk c ^ (r % 8).
#pragma once

#include <cstdint>

#include "condensate/kv_view.h"
#include "ptx/cp_async.h"
#include "ptx/matrix.h"

namespace condensate::device {

// Byte offset of chunk `chunk` (8 elements) of row `row` in a tile of kDim columns.
template <int kDim>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    static_assert(kDim % 64 == 0, "a swizzled row is a whole number of 128-byte lines");
    return static_cast<uint32_t>(row * (kDim * 2) + ((chunk ^ (row & 7)) << 4));
}

// An ldmatrix reads chunks 2j and 2j + 1 of 16 rows. The swizzle only flips address bits 4..6, so a
// lane's address for any j follows from its address for j = 0: one xor and constant offsets.
template <int kDim>
__device__ __forceinline__ uint32_t chunk_pair_address(uint32_t lane_smem, int rows, int j) {
    return (lane_smem ^ ((j & 3) << 5)) + rows * (kDim * 2) + (j >> 2) * 128;
}

// Lane address of a 16x16 block whose matrices are (rows 0-7, left), (8-15, left), (0-7, right),
// (8-15, right): A operands, and B operands stored [k][n] and loaded transposed.
template <int kDim>
__device__ __forceinline__ uint32_t row_major_lane(uint32_t tile_smem, int row) {
    int lane = threadIdx.x & 31;
    return tile_smem + tile_offset<kDim>(row + (lane & 15), lane >> 4);
}
// The same for (rows 0-7, left), (0-7, right), (8-15, left), (8-15, right): B operands stored
// [n][k].
template <int kDim>
__device__ __forceinline__ uint32_t column_major_lane(uint32_t tile_smem, int row) {
    int lane = threadIdx.x & 31;
    return tile_smem + tile_offset<kDim>(row + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

// Starts copying kRows rows of `head_dim` elements from `first` on into a tile; columns past
// head_dim and rows past the first `valid_rows` become zero.
template <class T, int kRows, int kDim, int kThreads>
__device__ __forceinline__ void copy_tile_async(uint32_t tile_smem, const KvView& rows,
                                                int64_t first, int64_t valid_rows, int head_dim) {
    constexpr int kChunks = kDim / 8;
    constexpr int kRowsPerPass = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kRows % kRowsPerPass == 0, "whole passes of the CTA");
    int chunk = threadIdx.x % kChunks;
    int row = threadIdx.x / kChunks;
    bool in_columns = chunk * 8 < head_dim;
    const int column = in_columns ? chunk * 8 : 0;
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
        bool copy = in_columns && row < valid_rows;
        ptx::cp_async_16(tile_smem + tile_offset<kDim>(row, chunk),
                         rows.row<T>(copy ? first + row : 0) + column, copy);
        row += kRowsPerPass;
    }
}

}  // namespace condensate::device
