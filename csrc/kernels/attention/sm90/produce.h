// The producer, one thread: walks each tile's blocks and keeps TMA ahead of the
// consumers.
#pragma once

#include "device/far_rows.h"
#include "device/tile_walk.h"
#include "kernels/attention/sm90/pipeline.h"
#include "kernels/attention/sm90/tensors.h"
#include "kernels/attention/sm90/traits.h"
#include "ptx/barrier.h"
#include "ptx/matrix.h"
#include "ptx/tensor_copy.h"

namespace condensate::kernels::sm90 {

template <class Traits>
class Producer {
  public:
    using Smem = typename Traits::Smem;
    using Step = typename Traits::Step;

    __device__ Producer(Smem& smem, const AttentionParams& params, const TensorMaps& maps)
        : smem_(smem), params_(params), maps_(maps) {}

    __device__ void tile(const Tile& tile) {
        load_queries(tile);
        const device::FarTile far(maps_.far, tile.ranges(params_.problem), tile.span());
        int condensed = Traits::kFar ? far.end : 0;  // blocks that are not walked
        AttentionWalk walk(params_, tile, {Traits::kFar, false, Traits::kEstimates});
        AttentionWalk::Step block = walk.next();
        bool last = false;
        while (!last) {  // at least one step, perhaps without blocks
            Step step;
            if constexpr (Traits::kEstimates) step.sampled = 0;
#pragma unroll
            for (int j = 0; j < Traits::kStepBlocks; ++j) {
                bool exists = block.block != INT_MAX;
                step.block[j] = exists ? block.block : static_cast<int>(num_blocks(tile.kv_len));
                step.whole[j] = block.whole;
                step.full[j] = block.full;
                if (Traits::kEstimates && block.sampled) step.sampled |= 1 << j;
                if (Traits::kFar && block.block < far.end) --condensed;
                if (exists) block = walk.next();
            }
            last = block.block == INT_MAX;
            step.last = last && condensed == 0;
            if constexpr (Traits::kFar) {
                step.far = false;
                step.far_next = last && condensed > 0;
            }
            load_step(tile, step);
        }
        if (condensed > 0) load_pools(tile, far.pools());
        errors |= walk.errors();
    }

    uint32_t errors = 0;

  private:
    __device__ void load_queries(const Tile& tile) {
        ptx::mbarrier_wait(ptx::smem_address(&smem_.q_empty), q_parity_ ^ 1);
        q_parity_ ^= 1;
        const int boxes = tile.group / maps_.box_heads;
        const int box_bytes = maps_.box_heads * tile.positions * 128;
        const uint32_t barrier = ptx::smem_address(&smem_.q_full);
        ptx::mbarrier_arrive_expect(barrier, Traits::kPanels * boxes * box_bytes);
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel)
            for (int box = 0; box < boxes; ++box)
                ptx::tensor_load_4d(ptx::smem_address(smem_.q[panel]) + box * box_bytes,
                                    &maps_.query, barrier, panel * 64,
                                    static_cast<int>(tile.first_query),
                                    tile.head(0) + box * maps_.box_heads, tile.batch);
    }

    // Premade means of the tile's pools.
    __device__ void load_pools(const Tile& tile, int pools) {
        for (int first = 0; first < pools; first += Traits::kStepKeys) {
            Step step = {};
            step.block[0] = first;
            step.last = first + Traits::kStepKeys >= pools;
            step.far = true;
            load_step(tile, step);
        }
    }

    __device__ void load_step(const Tile& tile, const Step& step) {
        int s = k_ring_.stage;
        ptx::mbarrier_wait(ptx::smem_address(&smem_.k_empty[s]), k_ring_.parity ^ 1);
        smem_.steps[s] = step;  // seen by whoever waits for this arrival
        load_rows(tile, step, 0, ptx::smem_address(smem_.k[s]), loaded(step, 0, s));
        k_ring_.advance();

        s = v_ring_.stage;
        ptx::mbarrier_wait(ptx::smem_address(&smem_.v_empty[s]), v_ring_.parity ^ 1);
        load_rows(tile, step, 1, ptx::smem_address(smem_.v[s]), loaded(step, 1, s));
        v_ring_.advance();
    }

    // What a step's rows arrive at: those of a far step are not what they should be yet. Whoever
    // waits for them there learns the stage.
    __device__ uint32_t loaded(const Step& step, int which, int stage) {
        if constexpr (Traits::kFar) {
            const int far_step = step.block[0] / Traits::kStepKeys;
            if (step.far) {
                (which == 0 ? smem_.far_stage_k : smem_.far_stage_v)[far_step] =
                    static_cast<uint8_t>(stage);
                return ptx::smem_address(which == 0 ? &smem_.far_loaded_k[far_step]
                                                    : &smem_.far_loaded_v[far_step]);
            }
        }
        return ptx::smem_address(which == 0 ? &smem_.k_full[stage] : &smem_.v_full[stage]);
    }

    // Keys (`which` 0) or values of a step's blocks, or of its pools.
    __device__ void load_rows(const Tile& tile, const Step& step, int which, uint32_t dst_smem,
                              uint32_t barrier) {
        ptx::mbarrier_arrive_expect(barrier, Traits::kStageBytes);
        if (Traits::kFar && step.far)
            load_means(tile, step.block[0], which, dst_smem, barrier);
        else
            load_blocks(tile, step, which == 0 ? &maps_.key : &maps_.value, dst_smem, barrier);
    }

    // Pools that do not exist lie behind the last one: they become zeros.
    __device__ void load_means(const Tile& tile, int first, int which, uint32_t dst_smem,
                               uint32_t barrier) {
        const int head = tile.flat_kv_head(params_.problem);
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel)
#pragma unroll
            for (int j = 0; j < Traits::kStepBlocks; ++j)
                ptx::tensor_load_4d(
                    dst_smem + panel * Traits::kKeyPanelBytes + j * Traits::kBlockBytes,
                    &maps_.far_means, barrier, panel * 64, first + j * kBlockKeys, head, which);
    }

    // Blocks that do not exist lie behind the last key: they become zeros.
    __device__ void load_blocks(const Tile& tile, const Step& step, const void* map,
                                uint32_t dst_smem, uint32_t barrier) {
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel)
#pragma unroll
            for (int j = 0; j < Traits::kStepBlocks; ++j)
                ptx::tensor_load_4d(
                    dst_smem + panel * Traits::kKeyPanelBytes + j * Traits::kBlockBytes, map,
                    barrier, panel * 64, step.block[j] * kBlockKeys, tile.kv_head, tile.batch);
    }

    Smem& smem_;
    const AttentionParams& params_;
    const TensorMaps& maps_;
    Ring<Traits::kKeyStages> k_ring_;
    Ring<Traits::kValueStages> v_ring_;
    uint32_t q_parity_ = 0;
};

}  // namespace condensate::kernels::sm90
