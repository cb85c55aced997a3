// Every existing query of a tile against units of few blocks: what the refinement of shortlists and
// its estimate share.
#pragma once

#include "condensate/params.h"
#include "kernels/block_select/eligible.h"
#include "kernels/block_select/held_rows.h"

namespace condensate::kernels::block_select {

struct Shortlists {
    const int32_t* indices;  // [tiles of all heads, width]
    const int32_t* counts;   // [tiles of all heads]
    int width;
};

template <class Traits>
struct RefinedSmem : Traits::Smem {
    RefinedRows tile;
    EligibleBlocks eligible;
    WalkedBlocks walked;                  // its list is the shortlist
    int shortlisted;                      // blocks of it
    const typename Traits::T* summaries;  // of the KV head
};

// A CTA's work on one tile.
template <class Traits>
struct RefinedTile {
    using T = typename Traits::T;
    using Scores = typename HeldRows<Traits>::Scores;

    RefinedSmem<Traits>& smem;
    const BlockSelectParams& params;
    float scale_log2;
    HeldRows<Traits> rows;

    __device__ RefinedTile(RefinedSmem<Traits>& smem, const BlockSelectParams& params)
        : smem(smem),
          params(params),
          scale_log2(params.problem.scale * 1.44269504088896341f),
          rows(smem) {}

    // Takes the tile's rows into registers and notes in shared memory what there is to know.
    __device__ __forceinline__ void begin(const RefinedRows& refined,
                                          const EligibleBlocks& eligible,
                                          const Shortlists& shortlists) {
        const Problem& problem = params.problem;
        const device::TileRows& tile = refined.tile;
        const T* query = static_cast<const T*>(params.query.data);
        device::gather_tile_async<Traits::kRows, Traits::kDim, kThreads>(
            ptx::smem_address(smem.stages), query, static_cast<int>(problem.head_dim),
            [&](int row) -> const T* {
                if (row >= refined.rows) return nullptr;
                return query + device::head_offset(params.query, tile.batch, refined.head(row)) +
                       refined.query(row) * params.query.stride_seq;
            });
        ptx::cp_async_commit();
        const int shortlisted = shortlists.counts[tile.tile_index];
        const WalkedBlocks walked(RangeBlocks(problem.ranges(), tile.span()),
                                  shortlists.indices + tile.tile_index * shortlists.width,
                                  shortlisted);
        if (threadIdx.x == 0) {
            smem.tile = refined;
            smem.eligible = eligible;
            smem.walked = walked;
            smem.shortlisted = shortlisted;
            smem.summaries = static_cast<const T*>(params.summaries) +
                             (tile.batch * problem.kv_heads + tile.kv_head) *
                                 summary_rows(Selector::kBlock, problem.kv_len) * problem.head_dim;
        }
        ptx::cp_async_wait<0>();
        __syncthreads();  // the rows have landed
        rows.hold([&](int row) {
            return row < refined.rows ? static_cast<int>(query_position(
                                            refined.query(row), problem.query_len, problem.kv_len))
                                      : kNoRow;
        });
        __syncthreads();  // all rows are in registers: the stages are free
    }

    // Scores units of blocks block_at(0 .. count - 1), ascending, chunk by chunk:
    // body(scores, place of the chunk's first block, blocks). Lane l of `blocks` names the chunk's
    // l-th block, -1 past the last; scores there are dropped.
    template <int kBlockUnits, class BlockAt, class Body>
    __device__ __forceinline__ void sweep(UnitLevel level, int count, BlockAt&& block_at,
                                          Body&& body) {
        using Shape = CopyShape<Traits>;
        using Layout = ChunkLayout<kBlockUnits>;
        constexpr unsigned kAll = 0xffffffffu;
        const Ranges ranges = params.problem.ranges();
        const int dim = static_cast<int>(params.problem.head_dim);
        const int stride = rows_per_block(Selector::kBlock) * dim;
        const int seen_by_all = rows.seen_by_all(ranges, level.keys);
        auto blocks_from = [&](int first) {
            int lane = threadIdx.x & 31;
            return lane < Layout::kBlocks && first + lane < count ? block_at(first + lane) : -1;
        };
        auto load = [&](int step, int stage) {
            const int blocks = blocks_from(step * Layout::kBlocks);
            const T* lane_gmem = smem.summaries + Shape::channel() +
                                 (level.first_row + Shape::unit() % kBlockUnits) * dim;
            copy_chunk_async<Traits, kBlockUnits>(
                ptx::smem_address(smem.stages[stage]), [&](int pass) {
                    // A pass holds whole blocks or lies in one.
                    const int first_unit = pass * Shape::kPassUnits;
                    int block = __shfl_sync(kAll, blocks,
                                            Shape::unit() / kBlockUnits + first_unit / kBlockUnits);
                    bool exists = block >= 0 && Shape::channel() < dim;
                    return UnitSource<T>{lane_gmem + int64_t{max(block, 0)} * stride +
                                             first_unit % kBlockUnits * dim,
                                         exists};
                });
        };
        auto score = [&](int step, int stage) {
            if (static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows >= smem.tile.rows) return;
            const int first = step * Layout::kBlocks;
            const int blocks = blocks_from(first);
            const int last = __shfl_sync(kAll, blocks, Layout::kBlocks - 1);
            Scores s;
            rows.score(s, stage);
            if (last < 0 || (last + 1) * kBlockUnits > seen_by_all) {
                rows.template mask<kBlockUnits>(s, ranges, level.keys, [&](int v) {
                    int block = __shfl_sync(kAll, blocks, Layout::block(v));
                    return block < 0 ? INT_MAX - kBlockUnits : block * kBlockUnits;
                });
            }
            body(s, first, blocks);
        };
        pipeline<Traits>((count + Layout::kBlocks - 1) / Layout::kBlocks, load, score);
    }
};

}  // namespace condensate::kernels::block_select
