// A consumer warpgroup: 64 rows of every tile. While the tensor cores multiply the weights of one
// step with its values, the warps turn the next step's scores into weights.
#pragma once

#include "condensate/tile.h"
#include "device/far_rows.h"
#include "device/omitted_rows.h"
#include "device/pack.h"
#include "device/row_mask.h"
#include "device/smem_tile.h"
#include "device/softmax.h"
#include "kernels/attention/sm90/pipeline.h"
#include "kernels/attention/sm90/tensors.h"
#include "kernels/attention/sm90/traits.h"
#include "ptx/barrier.h"
#include "ptx/tensor_copy.h"
#include "ptx/wgmma.h"

namespace condensate::kernels::sm90 {

template <class Traits>
class Consumer {
  public:
    using T = typename Traits::T;
    using Smem = typename Traits::Smem;
    using Step = typename Traits::Step;
    using Scores = float[1][Traits::kNTiles][4];
    using Output = float[1][Traits::kDTiles][4];
    using Weights = uint32_t[Traits::kNTiles / 2][4];
    using BlockSums = device::BlockSums<1>[Traits::kStepBlocks];
    using Omitted = device::OmittedRows<1>;

    __device__ Consumer(Smem& smem, const AttentionParams& params, const TensorMaps& maps)
        : smem_(smem),
          params_(params),
          maps_(maps),
          scale_log2_(device::exponent_scale(params.problem.scale)),
          warpgroup_(static_cast<int>(threadIdx.x) / 128) {}

    __device__ void tile(const Tile& tile) {
        Output out = {};
        Scores scores;
        Weights weights;
        device::OnlineSoftmax<1> softmax;
        BlockSums sums;
        Omitted omitted;
        float rescale[1][2];

        ptx::mbarrier_wait(ptx::smem_address(&smem_.q_full), q_parity_);
        q_parity_ ^= 1;
        Step step = start_scores(scores);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(scores[0]);
        release_scored(step);
        mask_blocks(scores, step, tile);
        softmax.raise(scores, scale_log2_, rescale);  // nothing to rescale yet
        weigh_blocks(scores, step, softmax, sums);
        pack(weights, scores);
        release_out();
        auto turn = [&](auto prepare, auto weigh) {
            const int sampled = Traits::kEstimates ? step.sampled : 0;
            step = start_scores(scores);
            start_values(out, weights);
            add_gaps(sampled, sums, softmax, omitted);  // while the tensor cores are busy
            ptx::wgmma_wait<1>();
            ptx::pin_registers(scores[0]);
            release_scored(step);
            prepare();
            bool raised = softmax.raise(scores, scale_log2_, rescale);
            weigh(raised);
            ptx::wgmma_wait<0>();
            ptx::pin_registers(out[0]);
            release_values();
            if (raised) device::scale_rows(out, rescale);
            pack(weights, scores);
        };
        // The far field's steps come last, in a loop of their own: that of blocks has no registers
        // to spare.
        while (!step.last && !(Traits::kFar && step.far_next))
            turn([&] { mask_blocks(scores, step, tile); },
                 [&](bool) { weigh_blocks(scores, step, softmax, sums); });
        if constexpr (Traits::kFar)
            while (!step.last)
                turn([&] { add_far_bias(scores, step); },
                     [&](bool raised) { weigh_pools(scores, softmax, raised, rescale, omitted); });
        start_values(out, weights);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(out[0]);
        release_values();
        if (Traits::kFar && !step.far) await_no_far_step();
        softmax.reduce_sums();
        if constexpr (Traits::kEstimates) omitted.store(params_, tile, warp_row(), softmax);
        store(tile, out, softmax);
    }

  private:
    __device__ int lane() const { return threadIdx.x & 31; }
    __device__ int warp_row() const { return static_cast<int>(threadIdx.x) / 32 * 16; }

    // Issues the next step's scores.
    __device__ Step start_scores(Scores& scores) {
        const int s = k_ring_.stage;
        ptx::mbarrier_wait(ptx::smem_address(&smem_.k_full[s]), k_ring_.parity);
        Step step = smem_.steps[s];
        uint32_t q = ptx::smem_address(smem_.q) + warpgroup_ * 64 * 128;
        uint32_t k = ptx::smem_address(smem_.k[s]);
        ptx::pin_registers(scores[0]);
        ptx::wgmma_fence();
#pragma unroll
        for (int d = 0; d < Traits::kDim / 16; ++d) {
            uint32_t in_panel = d % 4 * 32;
            ptx::wgmma<T>(scores[0],
                          ptx::smem_operand(q + d / 4 * Traits::kQueryPanelBytes + in_panel),
                          ptx::smem_operand(k + d / 4 * Traits::kKeyPanelBytes + in_panel), d > 0);
        }
        ptx::wgmma_commit();
        return step;
    }

    // Issues out += weights * values for the step whose weights were packed last.
    __device__ void start_values(Output& out, const Weights& weights) {
        const int s = v_ring_.stage;
        ptx::mbarrier_wait(ptx::smem_address(&smem_.v_full[s]), v_ring_.parity);
        uint32_t v = ptx::smem_address(smem_.v[s]);
        ptx::pin_registers(out[0]);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < Traits::kStepKeys / 16; ++k)
            ptx::wgmma<T>(out[0], weights[k],
                          ptx::smem_operand(v + k * 16 * 128, Traits::kKeyPanelBytes), 1);
        ptx::wgmma_commit();
    }

    // Lets the far field's warps write where the last tile's output was.
    __device__ void release_out() {
        if constexpr (Traits::kFar) {
            if (threadIdx.x % 128 == 0) {
                ptx::tensor_store_wait_read();
                ptx::mbarrier_arrive(ptx::smem_address(&smem_.out_free));
            }
            __syncwarp();
        }
    }
    // Keeps this warpgroup from running ahead of the far field's warps.
    __device__ void await_no_far_step() {
        if constexpr (Traits::kFar)
            ptx::mbarrier_wait(ptx::smem_address(&smem_.no_far_step), no_far_parity_);
        no_far_parity_ ^= 1;
    }

    __device__ void release_scored(const Step& step) {
        __syncwarp();
        if (lane() == 0) {
            ptx::mbarrier_arrive(ptx::smem_address(&smem_.k_empty[k_ring_.stage]));
            if (step.last) ptx::mbarrier_arrive(ptx::smem_address(&smem_.q_empty));
        }
        k_ring_.advance();
    }
    __device__ void release_values() {
        __syncwarp();
        if (lane() == 0) ptx::mbarrier_arrive(ptx::smem_address(&smem_.v_empty[v_ring_.stage]));
        v_ring_.advance();
    }

    // A pooled row counts as many keys as it stands for.
    __device__ void add_far_bias(Scores& scores, const Step& step) const {
        if (params_.problem.scale < 0.0f) device::negate(scores);
        const float* bias = smem_.far_bias + step.block[0] + 2 * (lane() & 3);
#pragma unroll
        for (int n = 0; n < Traits::kNTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                scores[0][n][e] = device::add_far_bias(scores[0][n][e], bias[8 * n + e % 2]);
    }

    // Drops the scores outside the rows' supports, and turns the others' signs to the weights'.
    __device__ void mask_blocks(Scores& scores, const Step& step, const Tile& tile) const {
        const Ranges ranges = tile.ranges(params_.problem);
#pragma unroll
        for (int j = 0; j < Traits::kStepBlocks; ++j) {
            if (step.full[j]) continue;
            const int64_t key_begin = int64_t{step.block[j]} * kBlockKeys;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int64_t position = tile.position(warp_row() + 8 * half + lane() / 4);
                uint64_t kept = device::visible_bits(ranges, position, key_begin);
                if (!Traits::kFar && !step.whole[j])
                    kept &= device::range_bits(ranges, position, key_begin);
                kept >>= 2 * (lane() & 3);
#pragma unroll
                for (int n = 0; n < 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (!(kept >> (8 * n + e) & 1))
                            scores[0][8 * j + n][2 * half + e] = -INFINITY;
            }
        }
        if (params_.problem.scale < 0.0f) device::negate(scores);
    }

    // Turns the scores of a step's blocks into weights, and keeps the sums of sampled ones. Every
    // instantiation adds up block by block, in the same order.
    __device__ void weigh_blocks(Scores& scores, const Step& step,
                                 device::OnlineSoftmax<1>& softmax, BlockSums& sums) const {
        constexpr int kBlockTiles = kBlockKeys / 8, kBlocks = Traits::kStepBlocks;
        if constexpr (Traits::kEstimates) {
            if (step.sampled & 1) sums[0].template set_scores<0, kBlockTiles>(scores);
            if constexpr (kBlocks == 2)
                if (step.sampled & 2) sums[1].template set_scores<kBlockTiles, kBlockTiles>(scores);
        }
        float weights[kBlocks][1][2];
        softmax.template weigh<Traits::kNTiles, kBlockTiles>(scores, scale_log2_, weights);
        if constexpr (Traits::kEstimates)
            for (int j = 0; j < kBlocks; ++j) sums[j].set_weights(weights[j]);
    }
    // Adds the gaps of what weigh_blocks() kept.
    __device__ void add_gaps(int sampled, const BlockSums& sums,
                             const device::OnlineSoftmax<1>& softmax, Omitted& omitted) const {
        if constexpr (Traits::kEstimates) {
            if (sampled == 0) return;
#pragma unroll
            for (int j = 0; j < Traits::kStepBlocks; ++j)
                if (sampled >> j & 1) omitted.add_block(sums[j], softmax, scale_log2_);
        }
    }

    // Turns the scores of pools into weights, and adds those up for the estimate.
    __device__ void weigh_pools(Scores& scores, device::OnlineSoftmax<1>& softmax, bool raised,
                                const float (&rescale)[1][2], Omitted& omitted) const {
        float weights[1][1][2];
        softmax.template weigh<Traits::kNTiles>(scores, scale_log2_, weights);
        if constexpr (Traits::kEstimates) {
            if (raised) omitted.rescale(rescale);
            omitted.add_pools(weights[0]);
        }
    }

    // Weights in the A layout, rounded to the values' type.
    __device__ void pack(Weights& weights, const Scores& p) const {
#pragma unroll
        for (int k = 0; k < Traits::kNTiles / 2; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float (&tile)[4] = p[0][2 * k + i / 2];
                weights[k][i] = device::pack2<T>(tile[2 * (i % 2)], tile[2 * (i % 2) + 1]);
            }
    }

    // Divides by the sums and writes the warpgroup's rows: registers -> shared -> global.
    __device__ void store(const Tile& tile, const Output& out,
                          const device::OnlineSoftmax<1>& softmax) {
        const bool leader = threadIdx.x % 128 == 0;
        const int barrier = kWarpgroupStore + warpgroup_;
        if (leader) ptx::tensor_store_wait_read();
        ptx::named_barrier_sync(barrier, 128);  // the last tile's rows have left
        char* rows_smem = reinterpret_cast<char*>(smem_.out);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = warp_row() + 8 * half + lane() / 4;
            float sum = softmax.row_sum[0][half];
            float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
            for (int n = 0; n < Traits::kDTiles; ++n) {
                uint32_t offset = n / 8 * Traits::kQueryPanelBytes +
                                  device::tile_offset<64>(row, n % 8) + 4 * (lane() & 3);
                *reinterpret_cast<uint32_t*>(rows_smem + offset) = device::pack2<T>(
                    out[0][n][2 * half] * inverse, out[0][n][2 * half + 1] * inverse);
            }
            if (params_.lse && (lane() & 3) == 0 && tile.exists(row))
                params_.lse[tile.flat_row(params_.problem, row)] = softmax.lse(0, half);
        }
        ptx::fence_async_proxy();
        ptx::named_barrier_sync(barrier, 128);  // all rows are written
        if (leader) store_boxes(tile);
    }

    __device__ void store_boxes(const Tile& tile) const {
        const int box_rows = maps_.box_heads * tile.positions;
        const int begin = warpgroup_ * 64, end = min(begin + 64, tile.rows());
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel)
            for (int row = begin; row < end; row += box_rows)
                ptx::tensor_store_4d(&maps_.out, ptx::smem_address(smem_.out[panel]) + row * 128,
                                     panel * 64, static_cast<int>(tile.first_query), tile.head(row),
                                     tile.batch);
        ptx::tensor_store_commit();
    }

    Smem& smem_;
    const AttentionParams& params_;
    const TensorMaps& maps_;
    const float scale_log2_;
    const int warpgroup_;
    Ring<Traits::kKeyStages> k_ring_;
    Ring<Traits::kValueStages> v_ring_;
    uint32_t q_parity_ = 0;
    uint32_t no_far_parity_ = 0;
};

}  // namespace condensate::kernels::sm90
