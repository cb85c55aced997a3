// The producer's other warps: they make the far field's rows what the tile needs. Rows that differ
// from the premade means are made while the consumers work on the tile's blocks, and wait where the
// last tile's output has left; when the copy engine has brought the premade means into a stage,
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

    __device__ void tile(const device::TileRows& tile) {
        record_walk(tile);
        head_ = tile.flat_kv_head(params_.problem);
        const device::FarTile far(maps_.far, params_.problem.ranges(), tile.span());
        const bool condenses = skip_blocks(far);
        await(&smem_.out_free, 1);
        if (!condenses) return release(&smem_.no_far_step);
        set_bias(far);
        const int changed = make_rows(far);
        for (int first = 0; first < far.pools(); first += Traits::kStepKeys) {
#pragma unroll 1
            for (int which = 0; which < 2; ++which) fill_stage(far, which, first, changed);
            pass_steps(1);
        }
    }

  private:
    static constexpr int kThreads = 32 * kFarWarps;
    // Half of a warp's lanes own a key row's channels, the others the value row's.
    static constexpr int kRowLanes = 16;
    using Channels = device::WideChannels<T, Traits::kDim / kRowLanes>;  // of a lane
    using Packed = typename Channels::Packed;
    using Panels = T[Traits::kPanels][Traits::kStepKeys * 64];

    __device__ auto walk() { return device::WarpWalk(smem_.walk); }

    __device__ void record_walk(const device::TileRows& tile) {
        ptx::named_barrier_sync(kFarThreads, kThreads);  // nobody reads the last tile's any more
        if (thread_ < 32) smem_.walk.set_by_warp(params_, tile);
        ptx::named_barrier_sync(kFarThreads, kThreads);
    }

    __device__ void pass_steps(int steps) {
        steps_ = (steps_ + steps) % (Traits::kKeyStages * Traits::kValueStages);
    }

    // Makes the rows of a far step's K (`which` 0) or V stage what they should be.
    __device__ void fill_stage(const device::FarTile& far, int which, int first, int changed) {
        const int step = first / Traits::kStepKeys;
        const int k = steps_ % Traits::kKeyStages, v = steps_ % Traits::kValueStages;
        await(which == 0 ? &smem_.far_loaded_k[step] : &smem_.far_loaded_v[step],
              2u << (2 * step + which));
        Panels& rows = which == 0 ? smem_.k[k] : smem_.v[v];
        replace_rows(far, which, first, changed, rows);
        if (which == 1) clear_rows(far.pools() - first, rows);
        release(which == 0 ? &smem_.k_full[k] : &smem_.v_full[v]);
    }

    // Passes the stages that the tile's blocks use. Returns whether they leave any to condense.
    __device__ bool skip_blocks(const device::FarTile& far) {
        int64_t condensed = far.all_keys();
        int blocks = 0;
        auto walked = walk();
        for (; walked.block != INT_MAX; walked.next()) {
            ++blocks;
            if (walked.block < far.end) condensed -= far.block_keys(walked.block);
        }
        pass_steps(max((blocks + Traits::kStepBlocks - 1) / Traits::kStepBlocks, 1));
        return condensed > 0;
    }

    // Every pool's bias as if nothing of it were walked.
    __device__ void set_bias(const device::FarTile& far) {
        const float scale = params_.problem.scale;
        for (int pool = thread_; pool < kFarPools; pool += kThreads)
            smem_.far_bias[pool] =
                device::far_bias(pool < far.pools() ? far.pool_keys(pool) : 0, scale);
        ptx::named_barrier_sync(kFarThreads, kThreads);  // before that of changed rows
    }

    // Makes changed rows, those with ordinals from..to - 1 of pools first..end - 1, and gives
    // store(pool, ordinal, share) each lane's share of a key or value row. The warps take turns.
    // Returns how many rows are changed.
    template <class Store>
    __device__ __forceinline__ int for_rows(const device::FarTile& far, int from, int to, int first,
                                            int end, const Store& store) {
        const Channels channels(params_, far, head_, row_half(), row_lane());
        return device::for_changed_pools(
            far, channels, walk(),
            [&](int pool, int ordinal) {
                return ordinal % kFarWarps == thread_ / 32 && ordinal >= from && ordinal < to &&
                       pool >= first && pool < end;
            },
            [&](int pool, int ordinal, int keys, const float (&mean)[Channels::kElems]) {
                if ((thread_ & 31) == 0)
                    smem_.far_bias[pool] = device::far_bias(keys, params_.problem.scale);
                store(pool, ordinal, channels.round(mean));
            });
    }

    // Makes as many changed rows as fit where the output was. Returns how many are changed.
    __device__ int make_rows(const device::FarTile& far) {
        return for_rows(far, 0, Traits::kMadeRows, 0, kFarPools,
                        [&](int pool, int ordinal, const Packed& share) {
                            made().pool[ordinal] = static_cast<uint8_t>(pool);
                            made_row(ordinal, row_half())[row_lane()] = share;
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

    // Replaces the changed rows of pools first..first + kStepKeys - 1: those made before, and those
    // that did not fit.
    __device__ void replace_rows(const device::FarTile& far, int which, int first, int changed,
                                 Panels& rows) {
        const int fit = min(changed, Traits::kMadeRows);
        __syncwarp();  // each warp replaces the rows that it made, two at a time
        for (int ordinal = thread_ / 32 + kFarWarps * row_half(); ordinal < fit;
             ordinal += 2 * kFarWarps) {
            const int row = made().pool[ordinal] - first;
            if (row >= 0 && row < Traits::kStepKeys)
                *staged(rows, row) = made_row(ordinal, which)[row_lane()];
        }
        if (changed <= Traits::kMadeRows) return;
        for_rows(far, Traits::kMadeRows, kFarPools, first, first + Traits::kStepKeys,
                 [&](int pool, int, const Packed& share) {
                     if (row_half() == which) *staged(rows, pool - first) = share;
                 });
    }

    // A weight of zero must not meet what lies behind the tile's pools.
    __device__ void clear_rows(int begin, Panels& rows) {
        for (int row = max(begin, 0) + thread_ / kRowLanes; row < Traits::kStepKeys;
             row += kThreads / kRowLanes)
            *staged(rows, row) = Packed{};
    }

    __device__ void await(uint64_t* barrier, uint32_t parity_bit) {
        ptx::mbarrier_wait(ptx::smem_address(barrier), (parities_ & parity_bit) != 0);
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
    int steps_ = 0;          // passed, modulo the round in which all stages come back
    uint32_t parities_ = 0;  // bit 0 of out_free, bits 1 + 2 s and 2 + 2 s of far step s
};

}  // namespace condensate::kernels::sm90
