// What a row's softmax, over units that pass by chunk by chunk, has outside a tile's walk.
#pragma once

#include "kernels/block_select/common/held_rows.h"

namespace condensate::kernels::block_select {

template <class Traits>
struct OutsideShare {
    static constexpr int kMTiles = Traits::kMTiles;

    device::OnlineSoftmax<kMTiles> softmax;
    float outside[kMTiles][2] = {};  // relative to the softmax's references

    // Turns a chunk's scores into weights; counts(v): is the lane's v-th block outside?
    template <class Layout, class Counts>
    __device__ __forceinline__ void add(typename HeldRows<Traits>::Scores& s, float scale_log2,
                                        Counts&& counts) {
        float rescale[kMTiles][2];
        if (softmax.raise(s, scale_log2, rescale)) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) outside[m][half] *= rescale[m][half];
        }
        softmax.weigh(s, scale_log2);
        bool lies_outside[Layout::kLaneBlocks];
#pragma unroll
        for (int v = 0; v < Layout::kLaneBlocks; ++v) lies_outside[v] = counts(v);
        for_each_block<Layout::kLaneUnits, Sum>(s, [&](int v, int m, int half, float weight) {
            outside[m][half] += lies_outside[v] ? weight : 0.0f;
        });
    }

    // Afterwards every lane has its rows' sums.
    __device__ __forceinline__ void reduce() {
        softmax.reduce_sums();
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                outside[m][half] = device::quad_sum(outside[m][half]);
    }
    __device__ __forceinline__ float reference(int m, int half) const {
        return device::finite_reference(softmax.reference[m][half]);
    }
    // The share, when so much more lies outside (in units of 2^reference); 0 for NaN.
    __device__ __forceinline__ float share(int m, int half, float more = 0.0f) const {
        const float share = (outside[m][half] + more) / (softmax.row_sum[m][half] + more);
        return fminf(fmaxf(share, 0.0f), 1.0f);
    }
};

}  // namespace condensate::kernels::block_select
