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
        walk().set(params_, tile);
        head_ = tile.flat_kv_head(params_.problem);
        const device::FarTile far(maps_.far, params_.problem.ranges(), tile.span());
        const bool condenses = skip_blocks(far);
        await(&smem_.out_free, 1);
        if (!condenses) return release(&smem_.no_far_step);
        set_bias(far);
        const int changed = make_rows(far);
        for (int first = 0; first < far.pools(); first += Traits::kStepKeys) {
            const int step = first / Traits::kStepKeys;
            const int k = steps_ % Traits::kKeyStages, v = steps_ % Traits::kValueStages;
            await(&smem_.far_loaded_k[step], 2 << 2 * step);
            replace_rows(far, 0, first, changed, smem_.k[k]);
            release(&smem_.k_full[k]);
            await(&smem_.far_loaded_v[step], 4 << 2 * step);
            replace_rows(far, 1, first, changed, smem_.v[v]);
            clear_rows(far.pools() - first, smem_.v[v]);
            release(&smem_.v_full[v]);
            pass_steps(1);
        }
    }

  private:
    static constexpr int kThreads = 32 * kFarWarps;
    using Channels = device::WideChannels<T, Traits::kDim / 32>;  // of a lane
    using Packed = typename Channels::Packed;
    using Panels = T[Traits::kPanels][Traits::kStepKeys * 64];

    __device__ device::WalkSmem& walk() { return smem_.walks[thread_ / 32]; }

    __device__ void pass_steps(int steps) {
        steps_ = (steps_ + steps) % (Traits::kKeyStages * Traits::kValueStages);
    }

    // Passes the stages that the tile's blocks use. Returns whether they leave any to condense.
    __device__ bool skip_blocks(const device::FarTile& far) {
        int64_t condensed = far.all_keys();
        int blocks = 0;
        device::WarpWalk walked(walk());
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

    // Makes changed key (`which` 0) or value rows, those with ordinals from..to - 1 of pools
    // first..end - 1, and gives store(pool, ordinal, row) each lane's share of one. The warps take
    // turns. Returns how many rows are changed.
    template <class Store>
    __device__ __forceinline__ int for_rows(const device::FarTile& far, int which, int from, int to,
                                            int first, int end, const Store& store) {
        const Channels channels(params_, far, head_, which, thread_ & 31);
        return device::for_changed_pools(
            far, channels, walk(),
            [&](int pool, int ordinal) {
                return ordinal % kFarWarps == thread_ / 32 && ordinal >= from && ordinal < to &&
                       pool >= first && pool < end;
            },
            [&](int pool, int ordinal, int keys, const float (&mean)[Channels::kElems]) {
                if (which == 0 && (thread_ & 31) == 0)
                    smem_.far_bias[pool] = device::far_bias(keys, params_.problem.scale);
                store(pool, ordinal, channels.round(mean));
            });
    }

    // Makes as many changed rows as fit where the output was. Returns how many are changed.
    __device__ int make_rows(const device::FarTile& far) {
        int changed = 0;
#pragma unroll 1
        for (int which = 0; which < 2; ++which)
            changed = for_rows(far, which, 0, Traits::kMadeRows, 0, kFarPools,
                               [&](int pool, int ordinal, const Packed& row) {
                                   made().pool[ordinal] = static_cast<uint8_t>(pool);
                                   made_row(ordinal, which)[thread_ & 31] = row;
                               });
        return changed;
    }

    __device__ auto& made() { return *reinterpret_cast<typename Traits::MadeRows*>(smem_.out); }
    __device__ Packed* made_row(int ordinal, int which) {
        return reinterpret_cast<Packed*>(made().row[ordinal][which]);
    }
    // A lane's share of a row in its stage.
    __device__ Packed* staged(Panels& rows, int row) {
        const int byte = (thread_ & 31) * static_cast<int>(sizeof(Packed));
        char* panel = reinterpret_cast<char*>(rows[byte / 128]);
        return reinterpret_cast<Packed*>(panel + device::tile_offset<64>(row, byte % 128 / 16) +
                                         byte % 16);
    }

    // Replaces the changed rows of pools first..first + kStepKeys - 1: those made before, and those
    // that did not fit.
    __device__ void replace_rows(const device::FarTile& far, int which, int first, int changed,
                                 Panels& rows) {
        const int fit = min(changed, Traits::kMadeRows);
        for (int ordinal = thread_ / 32; ordinal < fit; ordinal += kFarWarps) {
            const int row = made().pool[ordinal] - first;
            if (row >= 0 && row < Traits::kStepKeys)
                *staged(rows, row) = made_row(ordinal, which)[thread_ & 31];
        }
        if (changed <= Traits::kMadeRows) return;
        for_rows(far, which, Traits::kMadeRows, kFarPools, first, first + Traits::kStepKeys,
                 [&](int pool, int, const Packed& row) { *staged(rows, pool - first) = row; });
    }

    // A weight of zero must not meet what lies behind the tile's pools.
    __device__ void clear_rows(int begin, Panels& rows) {
        for (int row = max(begin, 0) + thread_ / 32; row < Traits::kStepKeys; row += kFarWarps)
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
