// The producer, one thread: walks each tile's blocks and keeps the copy engine ahead of the
// consumers.
#pragma once

#include "device/block_walk.h"
#include "device/tile_rows.h"
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

    __device__ void tile(const device::TileRows& tile) {
        load_queries(tile);
        const Ranges ranges = params_.problem.ranges();
        const TileSpan span = tile.span();
        const int32_t* list = nullptr;
        int64_t count = 0;
        if (params_.block_indices) {
            list = params_.block_indices + tile.tile_index * params_.max_blocks;
            count = params_.block_counts[tile.tile_index];
        }
        device::BlockWalk walk(ranges, span, list, count, list ? params_.max_blocks : 0);
        device::BlockStep block = walk.next();
        bool last = false;
        while (!last) {  // at least one step, perhaps without blocks
            Step step;
#pragma unroll
            for (int j = 0; j < Traits::kStepBlocks; ++j) {
                bool exists = block.block != INT_MAX;
                step.block[j] = exists ? block.block : static_cast<int>(num_blocks(ranges.kv_len));
                step.listed[j] = block.listed;
                step.full[j] = exists && block_cover(ranges, span, block.block, block.listed) ==
                                             BlockCover::kFull;
                if (exists) block = walk.next();
            }
            last = step.last = block.block == INT_MAX;
            load_step(tile, step);
        }
        errors |= walk.errors;
    }

    uint32_t errors = 0;

  private:
    __device__ void load_queries(const device::TileRows& tile) {
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

    __device__ void load_step(const device::TileRows& tile, const Step& step) {
        int s = k_ring_.stage;
        uint32_t full = ptx::smem_address(&smem_.k_full[s]);
        ptx::mbarrier_wait(ptx::smem_address(&smem_.k_empty[s]), k_ring_.parity ^ 1);
        smem_.steps[s] = step;  // seen by whoever waits for this arrival
        ptx::mbarrier_arrive_expect(full, Traits::kStageBytes);
        load_blocks(tile, step, &maps_.key, ptx::smem_address(smem_.k[s]), full);
        k_ring_.advance();

        s = v_ring_.stage;
        full = ptx::smem_address(&smem_.v_full[s]);
        ptx::mbarrier_wait(ptx::smem_address(&smem_.v_empty[s]), v_ring_.parity ^ 1);
        ptx::mbarrier_arrive_expect(full, Traits::kStageBytes);
        load_blocks(tile, step, &maps_.value, ptx::smem_address(smem_.v[s]), full);
        v_ring_.advance();
    }

    // Blocks that do not exist lie behind the last key: they become zeros.
    __device__ void load_blocks(const device::TileRows& tile, const Step& step, const void* map,
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
