// The averaged queries of a tile against units or keys of few blocks: what the refinement of
// shortlists and its estimate share.
#pragma once

#include "condensate/kv_view.h"
#include "condensate/params.h"
#include "kernels/block_select/common/eligible.h"
#include "kernels/block_select/common/held_rows.h"
#include "kernels/block_select/common/score_chunks.h"

namespace condensate::kernels::block_select {

struct Shortlists {
    const int32_t* indices;  // [scan tiles of all heads, width]
    const int32_t* counts;   // [scan tiles of all heads]
    int width;
    int positions;  // of a scan tile
    int per_head;   // scan tiles of a KV head

    // The whole warp calls it.
    __device__ TileShortlist of(const Tile& tile, int head, const EligibleBlocks& eligible) const {
        const int scan_tile = head * per_head + static_cast<int>(tile.first_query) / positions;
        return {indices + int64_t{scan_tile} * width, counts[scan_tile], eligible};
    }
};

template <class Traits>
struct RefinedSmem : Traits::Smem {
    PooledRows pooled;
    EligibleBlocks eligible;
    WalkedBlocks walked;  // its list is the shortlist, whose entries in the windows it skips
    TileShortlist shortlist;
    KvView summaries, keys;  // of the KV head
    int head;                // of all batches
};

// A CTA's work on one tile.
template <class Traits>
struct RefinedTile {
    using T = typename Traits::T;
    using Scores = typename HeldRows<Traits>::Scores;

    RefinedSmem<Traits>& smem;
    const BlockSelectParams& params;
    const typename Traits::Maps& maps;
    uint32_t& streamed;  // chunks so far
    float scale_log2;
    HeldRows<Traits> rows;

    __device__ RefinedTile(RefinedSmem<Traits>& smem, const BlockSelectParams& params,
                           const typename Traits::Maps& maps, uint32_t& streamed)
        : smem(smem),
          params(params),
          maps(maps),
          streamed(streamed),
          scale_log2(params.problem.scale * device::kLog2E),
          rows(smem) {}

    // Takes the tile's rows into registers and notes in shared memory what there is to know.
    __device__ __forceinline__ void begin(const PooledRows& pooled, const EligibleBlocks& eligible,
                                          const Shortlists& shortlists) {
        const Problem& problem = params.problem;
        const Tile& tile = pooled.tile;
        load_pooled_queries<Traits, kQueryPool>(
            ptx::smem_address(smem.stages), params, pooled,
            static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows);
        const int head = tile.flat_kv_head(problem);
        const TileShortlist shortlist = shortlists.of(tile, head, eligible);
        const WalkedBlocks walked(RangeBlocks(tile.ranges(problem), tile.span()), shortlist.list,
                                  shortlist.entries);
        if (threadIdx.x == 0) {
            smem.pooled = pooled;
            smem.eligible = eligible;
            smem.walked = walked;
            smem.shortlist = shortlist;
            smem.head = head;
            const int64_t rows = summary_rows(Selector::kBlock, problem.kv_len);
            smem.summaries =
                KvView::of({params.summaries, 0, rows * problem.head_dim, problem.head_dim},
                           sizeof(T), 0, head);
            if constexpr (Traits::kKeys)
                smem.keys = KvView::of(params.key, sizeof(T), tile.batch, tile.kv_head);
        }
        rows.hold([&](int row) {
            return row < pooled.rows ? static_cast<int>(pooled.last_position(row)) : kNoRow;
        });
        if constexpr (Traits::kWgmma) ptx::fence_async_proxy();
        __syncthreads();  // all rows are in registers, the stages are free; the notes are written
    }

    // Scores units of blocks block_at(0 .. count - 1), ascending, chunk by chunk: body(scores,
    // place of the chunk's first block). Scores past the last block are dropped.
    template <int kBlockUnits, class BlockAt, class Body>
    __device__ __forceinline__ void sweep(UnitLevel level, int count, BlockAt&& block_at,
                                          Body&& body) {
        using Layout = ChunkLayout<kBlockUnits, Traits::kWgmma>;
        constexpr unsigned kAll = 0xffffffffu;
        const Ranges ranges = smem.pooled.tile.ranges(params.problem);
        const int whole =
            leading_blocks(count, block_at, rows.seen_by_all(ranges, level.keys) / kBlockUnits);
        const bool idle_warp =
            static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows >= smem.pooled.rows;
        auto blocks_from = [&](int first) {
            int lane = threadIdx.x & 31;
            return lane < Layout::kBlocks && first + lane < count ? block_at(first + lane) : -1;
        };
        auto idle = [&](int) { return idle_warp; };
        auto look = [&](Scores& s, int step) {
            const int first = step * Layout::kBlocks;
            if (first + Layout::kBlocks > whole) {
                const int blocks = blocks_from(first);
                rows.template mask<kBlockUnits>(s, ranges, level.keys, [&](int v) {
                    int block = __shfl_sync(kAll, blocks, Layout::block(v));
                    return block < 0 ? INT_MAX - kBlockUnits : block * kBlockUnits;
                });
            }
            body(s, first);
        };
        score_chunks<Traits, Layout::kBlocks * Traits::kPanels>(
            smem, rows, streamed, (count + Layout::kBlocks - 1) / Layout::kBlocks,
            loader<kBlockUnits>(level, count, block_at), idle, look);
    }

  private:
    // How many of the blocks come before block `end`; the whole warp calls it.
    template <class BlockAt>
    static __device__ __forceinline__ int leading_blocks(int count, BlockAt&& block_at, int end) {
        int leading = 0;
        for (int first = 0; first < count; first += 32) {
            const int i = first + static_cast<int>(threadIdx.x & 31);
            leading += __popc(__ballot_sync(0xffffffffu, i < count && block_at(i) < end));
        }
        return leading;
    }

    // Where units lie: rows of the summaries, or the keys themselves.
    struct UnitRows {
        KvView rows;
        int64_t first_row;  // of block 0
        int64_t per_block;  // rows
        int64_t count;      // units that exist
    };
    template <int kBlockUnits>
    __device__ __forceinline__ UnitRows unit_rows(UnitLevel level) const {
        const int64_t kv_len = smem.pooled.tile.kv_len;
        if constexpr (kBlockUnits == kBlockKeys) return {smem.keys, 0, kBlockKeys, kv_len};
        return {smem.summaries, level.first_row, rows_per_block(Selector::kBlock),
                num_blocks(kv_len) * kBlockUnits};
    }

    // Starts copying the units of the blocks that lanes 0, 1, ... name; zeros for -1.
    template <int kBlockUnits>
    __device__ __forceinline__ void gather(UnitLevel level, int blocks, int stage) {
        using Shape = CopyShape<Traits>;
        const UnitRows units = unit_rows<kBlockUnits>(level);
        const bool has_channel = Shape::channel() < params.problem.head_dim;
        copy_chunk_async<Traits, kBlockUnits>(ptx::smem_address(smem.stages[stage]), [&](int pass) {
            // A pass holds whole blocks or lies in one.
            const int first_unit = pass * Shape::kPassUnits;
            const int block = __shfl_sync(0xffffffffu, blocks,
                                          Shape::unit() / kBlockUnits + first_unit / kBlockUnits);
            const int unit = Shape::unit() % kBlockUnits + first_unit % kBlockUnits;
            const bool exists =
                block >= 0 && has_channel && int64_t{block} * kBlockUnits + unit < units.count;
            const int64_t row = exists ? units.first_row + block * units.per_block + unit : 0;
            return UnitSource<T>{units.rows.template row<T>(row) + Shape::channel(), exists};
        });
    }

    // What starts copying the units of a sweep's blocks. A box is a panel of a block: the engine
    // fetches what is not there from behind the last block, as zeros.
    template <int kBlockUnits, class BlockAt>
    __device__ __forceinline__ auto loader(UnitLevel level, int count, BlockAt&& block_at) {
        constexpr int kBlocks = kChunkUnits / kBlockUnits;
        if constexpr (Traits::kWgmma) {
            static_assert(kBlocks * Traits::kPanels <= 32 * Traits::kWarps,
                          "a lane starts one box");
            auto block_of = [this, count, &block_at](int place) {
                return place < count ? block_at(place)
                                     : static_cast<int>(num_blocks(params.problem.kv_len));
            };
            const int later = static_cast<int>(threadIdx.x & 31) * Traits::kWarps;
            return [this, level, block_of, later](int step, uint32_t stage_smem,
                                                  uint32_t landed_smem, int box) {
                box += later;
                if (box >= kBlocks * Traits::kPanels) return;
                const int slot = box % kBlocks, panel = box / kBlocks;
                ptx::tensor_load_4d(
                    stage_smem + panel * Traits::kPanelBytes + slot * kBlockUnits * 128,
                    &maps.short_block, landed_smem, panel * 64, level.first_row,
                    block_of(step * kBlocks + slot), smem.head);
            };
        } else {
            return [this, level, count, &block_at](int step, int stage) {
                const int place = step * kBlocks + static_cast<int>(threadIdx.x & 31);
                const bool names = (threadIdx.x & 31) < kBlocks && place < count;
                gather<kBlockUnits>(level, names ? block_at(place) : -1, stage);
            };
        }
    }
};

}  // namespace condensate::kernels::block_select
