// The producer's other warps: they make the far field's rows what the tile needs. Rows that differ
// from the premade means are made while the consumers work on the tile's blocks, and wait where the
// last tile's output has left; when TMA has brought the premade means into a stage,
// they replace theirs.
#pragma once

#include "device/far_rows.h"
#include "device/smem_tile.h"
#include "kernels/attention/sm90/pipeline.h"
#include "kernels/attention/sm90/tensors.h"
#include "kernels/attention/sm90/traits.h"
#include "ptx/barrier.h"
#include "ptx/matrix.h"

namespace condensate::kernels::sm90 {

template <class Traits>
class FarRows {
  public:
    using T = typename Traits::T;
    using Smem = typename Traits::Smem;

    __device__ FarRows(Smem& smem, const AttentionParams& params, const TensorMaps& maps)
        : smem_(smem),
          params_(params),
          maps_(maps),
          thread_(static_cast<int>(threadIdx.x) - 32 * (Traits::kConsumerWarps + 1)) {}

    __device__ void tile(const Tile& tile) {
        const device::FarTile far(maps_.far, tile.ranges(params_.problem), tile.span());
        head_ = tile.flat_kv_head(params_.problem);
        record_walk(tile, far);
        await(&smem_.out_free, 1);
        if (smem_.walked == far.end) return release(&smem_.no_far_step);  // nothing to condense
        set_bias(far);
        // First the rows that fit where the output was, then the stages, K and V in turn.
        const int stages = 2 * ((far.pools() + Traits::kStepKeys - 1) / Traits::kStepKeys);
        int changed = 0;
#pragma unroll 1
        for (int stage = -1; stage < stages; ++stage) {
            if (stage >= 0) await_means(stage);
            if (stage < 0 || changed > Traits::kMadeRows) changed = make_rows(far, stage);
            if (stage >= 0) fill_stage(far, stage, changed);
        }
    }

  private:
    static constexpr int kThreads = 32 * kFarWarps;
    // Half of a warp's lanes own a key row's channels, the others the value row's.
    static constexpr int kRowLanes = 16;
    using Channels = device::WideChannels<T, Traits::kDim / kRowLanes>;  // of a lane
    using Packed = typename Channels::Packed;
    using Panels = T[Traits::kPanels][Traits::kStepKeys * 64];

    __device__ void record_walk(const Tile& tile, const device::FarTile& far) {
        ptx::named_barrier_sync(kFarThreads, kThreads);  // nobody reads the last tile's any more
        if (thread_ < 32) smem_.walked = smem_.walk.record(params_, tile, far.end).below;
        ptx::named_barrier_sync(kFarThreads, kThreads);
    }

    // Far stages count on, K (0) and V (1) of the first far step, then of the next.
    static __device__ int which(int stage) { return stage % 2; }
    static __device__ int first_pool(int stage) { return stage / 2 * Traits::kStepKeys; }

    // Waits for the premade rows of a far stage.
    __device__ void await_means(int stage) {
        const int step = stage / 2;
        await(which(stage) == 0 ? &smem_.far_loaded_k[step] : &smem_.far_loaded_v[step],
              2u << stage);
    }

    // Where the rows of an awaited far stage lie.
    __device__ Panels& panels(int stage) {
        const int step = stage / 2;
        return which(stage) == 0 ? smem_.k[smem_.far_stage_k[step]]
                                 : smem_.v[smem_.far_stage_v[step]];
    }
    __device__ uint64_t* full(int stage) {
        const int step = stage / 2;
        return which(stage) == 0 ? &smem_.k_full[smem_.far_stage_k[step]]
                                 : &smem_.v_full[smem_.far_stage_v[step]];
    }

    // Makes the rows of a far stage what they should be, and hands it to the consumers.
    __device__ void fill_stage(const device::FarTile& far, int stage, int changed) {
        Panels& rows = panels(stage);
        replace_rows(stage, changed, rows);
        if (which(stage) == 1) clear_rows(far.pools() - first_pool(stage), rows);
        release(full(stage));
    }

    // Every pool's bias as if nothing of it were walked.
    __device__ void set_bias(const device::FarTile& far) {
        const float scale = params_.problem.scale;
        for (int pool = thread_; pool < kFarPools; pool += kThreads)
            smem_.far_bias[pool] =
                device::far_bias(pool < far.pools() ? far.pool_keys(pool) : 0, scale);
        ptx::named_barrier_sync(kFarThreads, kThreads);  // before that of changed rows
    }

    // Makes changed rows, the warps in turn: with stage -1 as many as fit where the output was,
    // else the others of this stage, in their places. Returns how many rows are changed. There is
    // one such function, and one call of it, to keep the code small.
    __device__ __forceinline__ int make_rows(const device::FarTile& far, int stage) {
        const Channels channels(params_, far, head_, row_half(), row_lane());
        const bool ahead = stage < 0;
        const int first = ahead ? 0 : first_pool(stage);
        const int end = ahead ? kFarPools : first + Traits::kStepKeys;
        return device::for_changed_pools(
            far, channels, device::WarpWalk(smem_.walk),
            [&](int pool, int ordinal) {
                return ordinal % kFarWarps == thread_ / 32 &&
                       ahead == (ordinal < Traits::kMadeRows) && pool >= first && pool < end;
            },
            [&](int pool, int ordinal, int keys, const float (&mean)[Channels::kElems]) {
                if ((thread_ & 31) == 0)
                    smem_.far_bias[pool] = device::far_bias(keys, params_.problem.scale);
                const Packed share = channels.round(mean);
                if (ahead) {
                    made().pool[ordinal] = static_cast<uint8_t>(pool);
                    made_row(ordinal, row_half())[row_lane()] = share;
                } else if (row_half() == which(stage)) {
                    *staged(panels(stage), pool - first) = share;
                }
            });
    }

    __device__ int row_half() const { return thread_ / kRowLanes % 2; }
    __device__ int row_lane() const { return thread_ % kRowLanes; }

    __device__ auto& made() { return *reinterpret_cast<typename Traits::MadeRows*>(smem_.out); }
    __device__ Packed* made_row(int ordinal, int which) {
        return reinterpret_cast<Packed*>(made().row[ordinal][which]);
    }
    // A lane's share of a row in its stage.
    __device__ Packed* staged(Panels& rows, int row) {
        const int byte = row_lane() * static_cast<int>(sizeof(Packed));
        char* panel = reinterpret_cast<char*>(rows[byte / 128]);
        return reinterpret_cast<Packed*>(panel + device::tile_offset<64>(row, byte % 128 / 16) +
                                         byte % 16);
    }

    // Puts the changed rows of a stage that were made ahead in their places.
    __device__ void replace_rows(int stage, int changed, Panels& rows) {
        const int fit = min(changed, Traits::kMadeRows);
        __syncwarp();  // each warp replaces the rows that it made, two at a time
        for (int ordinal = thread_ / 32 + kFarWarps * row_half(); ordinal < fit;
             ordinal += 2 * kFarWarps) {
            const int row = made().pool[ordinal] - first_pool(stage);
            if (row >= 0 && row < Traits::kStepKeys)
                *staged(rows, row) = made_row(ordinal, which(stage))[row_lane()];
        }
    }

    // A weight of zero must not meet what lies behind the tile's pools.
    __device__ void clear_rows(int begin, Panels& rows) {
        for (int row = max(begin, 0) + thread_ / kRowLanes; row < Traits::kStepKeys;
             row += kThreads / kRowLanes)
            *staged(rows, row) = Packed{};
    }

    // One warp asks, so that the others do not crowd the consumers' memory instructions.
    __device__ void await(uint64_t* barrier, uint32_t parity_bit) {
        if (thread_ < 32)
            ptx::mbarrier_wait_patiently(ptx::smem_address(barrier), (parities_ & parity_bit) != 0);
        ptx::named_barrier_sync(kFarThreads, kThreads);
        parities_ ^= parity_bit;
    }
    // What these warps wrote may be read, by the tensor cores too.
    __device__ void release(uint64_t* barrier) {
        ptx::fence_async_proxy();
        ptx::named_barrier_sync(kFarThreads, kThreads);
        if (thread_ == 0) ptx::mbarrier_arrive(ptx::smem_address(barrier));
    }

    Smem& smem_;
    const AttentionParams& params_;
    const TensorMaps& maps_;
    const int thread_;       // of these warps
    int head_ = 0;           // of the tile, in [B, Hkv]
    uint32_t parities_ = 0;  // bit 0 of out_free, bit 1 + s of far stage s
};

}  // namespace condensate::kernels::sm90
