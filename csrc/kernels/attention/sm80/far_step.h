// The far field's pooled rows of a tile, in the stages of the pipeline: premade means by cp.async,
// then the rows that the tile changes. They come first, when no accumulators take up registers.
#pragma once

#include "device/far_rows.h"
#include "device/omitted_rows.h"
#include "device/smem_tile.h"

namespace condensate::kernels::sm80 {

// Every pool's bias as if nothing of it were walked, a thread for each pool.
template <class Traits>
__device__ __forceinline__ void set_far_bias(typename Traits::Smem& smem,
                                             const device::FarTile& far, float scale) {
    const int pool = static_cast<int>(threadIdx.x);
    smem.far_bias[pool] = device::far_bias(pool < far.pools() ? far.pool_keys(pool) : 0, scale);
}

// Copies the premade rows from pool `first` on, as many as the stages hold. Rows past the tile's
// pools become zero.
template <class Traits>
__device__ __forceinline__ void load_far_means(typename Traits::Smem& smem,
                                               const AttentionParams& params, const Tile& tile,
                                               const device::FarTile& far, int first) {
    using T = typename Traits::T;
    const Problem& p = params.problem;
    const int head = tile.flat_kv_head(p);
    const int head_dim = static_cast<int>(p.head_dim);
    for (int stage = 0; stage < Traits::kStages; ++stage, first += Traits::kStepKeys) {
        auto copy = [&](int which, T* rows_smem) {
            const T* rows = static_cast<const T*>(params.far_field.means) +
                            device::far_pools_offset(p, far, which, head) + first * p.head_dim;
            device::copy_tile_async<T, Traits::kStepKeys, Traits::kDim, Traits::kThreads>(
                ptx::smem_address(rows_smem), KvView{rows, p.head_dim}, 0, far.pools() - first,
                head_dim);
        };
        copy(0, smem.k[stage]);
        copy(1, smem.v[stage]);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}

// Replaces the rows that are not premade and sets their bias. The warps take turns; a lane owns
// eight channels of a key or value row.
template <class Traits>
__device__ __forceinline__ void change_far_rows(typename Traits::Smem& smem,
                                                const AttentionParams& params, int head,
                                                const device::FarTile& far, int first) {
    using T = typename Traits::T;
    using Packed = typename device::WideChannels<T, 8>::Packed;
    constexpr int kChunks = Traits::kDim / 8;
    const Problem& p = params.problem;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll 1
    for (int part = 0; part < 2 * kChunks; part += 32) {
        const int which = (part + lane) / kChunks, chunk = (part + lane) % kChunks;
        // Lanes without channels follow, too.
        const bool owns = which < 2 && chunk * 8 < p.head_dim;
        const device::WideChannels<T, 8> channels(params, far, head, owns ? which : 0,
                                                  owns ? chunk : 0);
        char* rows_smem = reinterpret_cast<char*>(which == 0 ? smem.k : smem.v);
        device::for_changed_pools(
            far, channels, device::WarpWalk(smem.walk),
            [&](int pool, int ordinal) {
                return ordinal % Traits::kWarps == warp && pool >= first &&
                       pool < first + Traits::kFarRound;
            },
            [&](int pool, int /*ordinal*/, int keys, const float (&mean)[8]) {
                // The stages lie side by side, so their rows count on.
                const uint32_t at = device::tile_offset<Traits::kDim>(pool - first, chunk);
                if (owns) *reinterpret_cast<Packed*>(rows_smem + at) = channels.round(mean);
                if (lane == 0) smem.far_bias[pool] = device::far_bias(keys, p.scale);
            });
    }
}

// Fills the stages with pooled rows from pool `first` on. All threads call it when nobody reads the
// stages. Returns how many pools the tile has, 0 where none that was made so far has a weight.
// Not inlined, so that nothing of it takes registers from the loop over the blocks.
template <class Traits>
__device__ __noinline__ int make_far_rows(typename Traits::Smem& smem,
                                          const AttentionParams& params, int64_t tile_index,
                                          int first) {
    const Tile tile = Tile::longest_first(params.problem, tile_index);
    const Ranges ranges = tile.ranges(params.problem);
    const device::FarTile far(device::FarShape::of(ranges.kv_len), ranges, tile.span());
    if (first >= far.pools()) return 0;
    if (first == 0) {
        set_far_bias<Traits>(smem, far, params.problem.scale);
        if (threadIdx.x < 32) smem.walk.record(params, tile, far.end);
    }
    load_far_means<Traits>(smem, params, tile, far, first);
    __syncthreads();  // premade rows and their bias are there
    change_far_rows<Traits>(smem, params, tile.flat_kv_head(params.problem), far, first);
    __syncthreads();  // so are the others
    return __syncthreads_or(smem.far_bias[threadIdx.x] != -INFINITY) ? far.pools() : 0;
}

// Calls attend(stage, bias) for every kStepKeys pooled rows, which then lie in that stage. The
// stages are free before and after.
template <class Traits, class Attend>
__device__ __forceinline__ void for_far_steps(typename Traits::Smem& smem,
                                              const AttentionParams& params, int64_t tile_index,
                                              const Attend& attend) {
#pragma unroll 1
    for (int first = 0; first < kFarPools; first += Traits::kFarRound) {
        const int pools = make_far_rows<Traits>(smem, params, tile_index, first);
#pragma unroll 1
        for (int pool = first, stage = 0; pool < pools && stage < Traits::kStages;
             pool += Traits::kStepKeys)
            attend(stage++, smem.far_bias + pool);
        __syncthreads();  // everyone is done with the stages
    }
}

// What a warp's rows gather for their estimates, from blocks of one or two steps.
template <class Traits>
struct OmittedSteps : device::OmittedRows<Traits::kMTiles> {
    using Softmax = device::OnlineSoftmax<Traits::kMTiles>;
    using Sums = float[Traits::kMTiles][2];

    device::BlockSums<Traits::kMTiles> block;
    bool half_block = false;  // `block` has the first of two steps

    __device__ __forceinline__ void rescale(const Sums& factor) {
        device::OmittedRows<Traits::kMTiles>::rescale(factor);
        block.rescale_weights(factor);
    }
    // A sampled block's scores, then its weights; twice where a step is half a block.
    __device__ __forceinline__ void add_scores(
        const float (&s)[Traits::kMTiles][Traits::kNTiles][4]) {
        block.template add_scores<0, Traits::kNTiles>(s);
    }
    __device__ __forceinline__ void add_weights(const Sums& weights, const Softmax& softmax,
                                                float scale_log2) {
        block.add_weights(weights);
        if (Traits::kStepKeys < kBlockKeys) half_block = !half_block;
        if (half_block) return;
        this->add_block(block, softmax, scale_log2);
        block = {};
    }
};

template <int kMTiles, int kNTiles>
__device__ __forceinline__ void add_far_bias(float (&s)[kMTiles][kNTiles][4],
                                             const float* bias_smem) {
    const int lane_row = 2 * (static_cast<int>(threadIdx.x) & 3);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float bias = bias_smem[8 * n + lane_row + (e & 1)];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) s[m][n][e] = device::add_far_bias(s[m][n][e], bias);
        }
}

}  // namespace condensate::kernels::sm80
