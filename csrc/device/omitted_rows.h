// What the rows of mma tiles gather for their estimates of the omitted mass.
#pragma once

#include "condensate/omitted_estimate.h"
#include "condensate/tile.h"
#include "device/softmax.h"

namespace condensate::device {

// A lane's sums over a block, as its keys pass by: of scores, and of weights relative to the
// softmax's references.
template <int kMTiles>
struct BlockSums {
    float scores[kMTiles][2] = {};
    float weights[kMTiles][2] = {};

    // Of raw scores, 8-key tiles kFirst..kFirst + kTiles - 1.
    template <int kFirst, int kTiles, int kNTiles>
    __device__ __forceinline__ void set_scores(const float (&s)[kMTiles][kNTiles][4]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) scores[m][0] = scores[m][1] = 0.0f;
        add_scores<kFirst, kTiles>(s);
    }
    __device__ __forceinline__ void set_weights(const float (&sums)[kMTiles][2]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) weights[m][half] = sums[m][half];
    }
    template <int kFirst, int kTiles, int kNTiles>
    __device__ __forceinline__ void add_scores(const float (&s)[kMTiles][kNTiles][4]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sums[2] = {};  // two short chains of additions instead of a long one
#pragma unroll
                for (int n = kFirst; n < kFirst + kTiles; ++n)
                    sums[n % 2] += s[m][n][2 * half] + s[m][n][2 * half + 1];
                scores[m][half] += sums[0] + sums[1];
            }
        }
    }
    __device__ __forceinline__ void add_weights(const float (&sums)[kMTiles][2]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) weights[m][half] += sums[m][half];
    }
    __device__ __forceinline__ void rescale_weights(const float (&rescale)[kMTiles][2]) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) weights[m][half] *= rescale[m][half];
    }
};

// Of a lane's rows: a lane's share of each.
template <int kMTiles>
struct OmittedRows {
    using Sums = float[kMTiles][2];

    OmittedEstimate<float> row[kMTiles][2];

    __device__ __forceinline__ void rescale(const Sums& factor) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) row[m][half].rescale(factor[m][half]);
    }
    // Weights of pools, as OnlineSoftmax::weigh() leaves them.
    __device__ __forceinline__ void add_pools(const Sums& weights) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) row[m][half].add_pools(weights[m][half]);
    }

    // A sampled block, unless it weighs nothing beside the row's largest score.
    __device__ __forceinline__ void add_block(const BlockSums<kMTiles>& block,
                                              const OnlineSoftmax<kMTiles>& softmax,
                                              float scale_log2) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float weight = quad_sum(block.weights[m][half]);
                if (!(weight >= kGapLeastWeight)) continue;
                // The lanes of a quad share the logarithm.
                row[m][half].add_block(0.25f * (__log2f(weight) + softmax.reference[m][half]),
                                       scale_log2 / kBlockKeys * block.scores[m][half]);
            }
        }
    }

    // Writes the estimates of the warp's rows; `softmax` after reduce_sums().
    __device__ __forceinline__ void store(const AttentionParams& params, const Tile& tile,
                                          int warp_first_row,
                                          const OnlineSoftmax<kMTiles>& softmax) const {
        const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const OmittedEstimate<float>& of_lane = row[m][half];
                const OmittedEstimate<float> whole = {quad_sum(of_lane.pools),
                                                      quad_sum(of_lane.gaps), of_lane.blocks};
                const float share = whole.share(softmax.row_sum[m][half]);
                const int tile_row = warp_first_row + 16 * m + 8 * half + lane / 4;
                if (lane % 4 == 0 && tile.exists(tile_row))
                    params.omitted_mass_estimate[tile.flat_row(params.problem, tile_row)] = share;
            }
        }
    }
};

}  // namespace condensate::device
