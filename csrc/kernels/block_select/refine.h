// The refinement of shortlists: every query of a tile, not pooled, against the fine units of few
// blocks. A persistent CTA takes a tile at a time, four warps of 32 (or 16) rows. One pass over the
// middle units of all walked blocks finds each row's softmax sum, one over the fine units of the
// shortlist the masses; the largest are the list. A third pass serves the estimate alone.
#pragma once

#include "condensate/params.h"
#include "kernels/block_select/eligible.h"
#include "kernels/block_select/held_rows.h"
#include "kernels/block_select/top_blocks.h"

namespace condensate::kernels::block_select {

struct Shortlists {
    const int32_t* indices;  // [tiles of all heads, width]
    const int32_t* counts;   // [tiles of all heads]
    int width;
    uint32_t* masses;  // per resident CTA: [warp][width]
    int tiles_per_head;
    int tiles;
};

// The existing rows of a tile without gaps: row r is query r % positions of head r / positions.
struct RefinedRows {
    device::TileRows tile;
    int positions, rows;

    __device__ explicit RefinedRows(const device::TileRows& tile)
        : tile(tile),
          positions(static_cast<int>(min_i64(tile.positions, tile.query_len - tile.first_query))),
          rows(positions * tile.group) {}
    __device__ int64_t query(int row) const { return tile.first_query + row % positions; }
    __device__ int head(int row) const { return tile.kv_head * tile.group + row / positions; }
    __device__ int64_t flat_row(int row, int64_t query_heads) const {
        return (tile.batch * query_heads + head(row)) * tile.query_len + query(row);
    }
};

template <class Traits>
struct RefineSmem : Traits::Smem {
    RefinedRows tile;
    EligibleBlocks eligible;
    WalkedBlocks walked;                  // its list is the shortlist
    const typename Traits::T* summaries;  // of the KV head
    int count;                            // of the shortlist
    uint32_t* masses;                     // of the shortlist, [warp][width]
    int width;

    __device__ int32_t* list(const BlockSelectParams& params) const {
        return params.block_indices + tile.tile.tile_index * params.max_blocks;
    }
};

template <class Traits>
struct TileRefinement {
    using T = typename Traits::T;
    using Scores = typename HeldRows<Traits>::Scores;
    static constexpr int kMTiles = Traits::kMTiles;

    RefineSmem<Traits>& smem;
    const BlockSelectParams& params;
    float scale_log2;
    HeldRows<Traits> rows;

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

    __device__ __forceinline__ void find_norm() {
        device::OnlineSoftmax<kMTiles> softmax;
        sweep<kRefinementLevels.norm.per_block>(
            kRefinementLevels.norm, smem.walked.size, [&](int i) { return smem.walked.at(i); },
            [&](Scores& s, int, int) {
                float rescale[kMTiles][2];
                softmax.raise(s, scale_log2, rescale);
                softmax.weigh(s, scale_log2);
            });
        rows.normalise(softmax);
    }

    // Of every block of the shortlist, the largest over this warp's rows.
    __device__ __forceinline__ void find_masses() {
        const int lane = threadIdx.x & 31;
        sweep<kRefinementLevels.mass.per_block>(
            kRefinementLevels.mass, smem.count, [&](int i) { return __ldg(smem.walked.list + i); },
            [&](Scores& s, int first, int) {
                rows.weigh(s, scale_log2);
                float mass[1];
                tile_masses<kRefinementLevels.mass.per_block>(mass, s);
                if (lane < 4 && first + lane < smem.count) {
                    uint32_t* masses = smem.masses + threadIdx.x / 32 * smem.width;
                    masses[first + lane] = __float_as_uint(mass[0]);
                }
            });
    }

    // `estimate` holds log2 of the pooled sum R over blocks outside the walked ones, and becomes
    // the share of what lies in eligible blocks that are not listed.
    __device__ __forceinline__ void estimate(const int32_t* list, int list_count) {
        device::OnlineSoftmax<kMTiles> softmax;
        float omitted[kMTiles][2] = {};
        sweep<kRefinementLevels.mass.per_block>(
            kRefinementLevels.mass, smem.walked.size, [&](int i) { return smem.walked.at(i); },
            [&](Scores& s, int, int blocks) {
                float rescale[kMTiles][2];
                if (softmax.raise(s, scale_log2, rescale)) {
#pragma unroll
                    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                        for (int half = 0; half < 2; ++half) omitted[m][half] *= rescale[m][half];
                }
                softmax.weigh(s, scale_log2);
                const int block = __shfl_sync(0xffffffffu, blocks, threadIdx.x & 3);
                const bool counts =
                    smem.eligible.contains(block) && !is_listed(list, list_count, block);
                for_each_block<kRefinementLevels.mass.per_block>(
                    s, [&](int, int m, int half, float weight) {
                        omitted[m][half] += counts ? weight : 0.0f;
                    });
            });
        softmax.reduce_sums();
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                write_share(rows.row(m, half), softmax.row_sum[m][half],
                            device::quad_sum(omitted[m][half]), softmax.reference[m][half]);
    }

    static __device__ __forceinline__ bool is_listed(const int32_t* list, int count, int block) {
        int low = 0;  // entries before it are smaller than `block`
        for (int size = count; size > 0;) {
            int half = size / 2;
            bool smaller = list[low + half] < block;
            low = smaller ? low + half + 1 : low;
            size = smaller ? size - half - 1 : half;
        }
        return low < count && list[low] == block;
    }

    // Both sums are in units of 2^reference.
    __device__ __forceinline__ void write_share(int row, float sum, float omitted,
                                                float reference) const {
        if ((threadIdx.x & 3) != 0 || row >= smem.tile.rows) return;
        float* at =
            params.omitted_mass_estimate + smem.tile.flat_row(row, params.problem.query_heads);
        // A middle unit stands for four fine ones. The bound keeps inf / inf away.
        float unseen = fminf(4.0f * exp2f(*at - device::finite_reference(reference)), 1e30f);
        float share = (omitted + unseen) / (sum + unseen);
        *at = fminf(fmaxf(share, 0.0f), 1.0f);  // 0 for NaN
    }
};

// The list, from the warps' masses of the shortlist; one warp calls it.
template <class Traits>
__device__ __forceinline__ void choose(const RefineSmem<Traits>& smem, uint32_t* histogram_smem,
                                       int32_t* list, int keep) {
    const int warps = (smem.tile.rows + Traits::kWarpRows - 1) / Traits::kWarpRows;
    const int count = smem.count;
    uint32_t* masses = smem.masses;
    for (int i = threadIdx.x & 31; i < count; i += 32) {
        uint32_t mass = masses[i];
        for (int w = 1; w < warps; ++w) mass = max(mass, masses[w * smem.width + i]);
        masses[i] = mass;
    }
    __syncwarp();
    Threshold threshold = radix_threshold(masses, count, keep, histogram_smem);
    write_list(masses, smem.walked.list, count, threshold, list, nullptr);
}

// A tile without a choice: all eligible blocks are listed, and none is omitted.
__device__ __forceinline__ void take_all(const BlockSelectParams& params, const RefinedRows& rows,
                                         const EligibleBlocks& eligible, int32_t* list) {
    if (threadIdx.x < 32) {
        write_all(eligible, list, params.max_blocks);
        if (threadIdx.x == 0) params.block_counts[rows.tile.tile_index] = eligible.count();
    }
    if (!params.omitted_mass_estimate) return;
    for (int row = threadIdx.x; row < rows.rows; row += kThreads)
        params.omitted_mass_estimate[rows.flat_row(row, params.problem.query_heads)] = 0.0f;
}

template <class Traits>
__global__ void __launch_bounds__(kThreads, Traits::kCtasPerSm)
    block_refine_kernel(const __grid_constant__ BlockSelectParams params,
                        const __grid_constant__ Shortlists shortlists) {
    using T = typename Traits::T;
    extern __shared__ __align__(128) char smem_bytes[];
    auto& smem = *reinterpret_cast<RefineSmem<Traits>*>(smem_bytes);

    const Problem& problem = params.problem;
    const Ranges ranges = problem.ranges();
    const int warp = threadIdx.x / 32;
    for (int index = blockIdx.x; index < shortlists.tiles; index += gridDim.x) {
        const auto tile = device::TileRows::from_index(problem, index);
        const RefinedRows refined(tile);
        const EligibleBlocks eligible(ranges, tile.span());
        int32_t* const list = params.block_indices + tile.tile_index * params.max_blocks;
        if (eligible.count() <= params.max_blocks) {
            take_all(params, refined, eligible, list);
            continue;
        }
        const int32_t* shortlist = shortlists.indices + tile.tile_index * shortlists.width;
        const int count = shortlists.counts[tile.tile_index];
        const int keep = static_cast<int>(params.max_blocks);

        const T* query = static_cast<const T*>(params.query.data);
        device::gather_tile_async<Traits::kRows, Traits::kDim, kThreads>(
            ptx::smem_address(smem.stages), query, static_cast<int>(problem.head_dim),
            [&](int row) -> const T* {
                if (row >= refined.rows) return nullptr;
                return query + device::head_offset(params.query, tile.batch, refined.head(row)) +
                       refined.query(row) * params.query.stride_seq;
            });
        ptx::cp_async_commit();
        const WalkedBlocks walked(RangeBlocks(ranges, tile.span()), shortlist, count);
        if (threadIdx.x == 0) {
            smem.tile = refined;
            smem.eligible = eligible;
            smem.walked = walked;
            smem.summaries = static_cast<const T*>(params.summaries) +
                             index / shortlists.tiles_per_head *
                                 summary_rows(Selector::kBlock, problem.kv_len) * problem.head_dim;
            smem.count = count;
            smem.width = shortlists.width;
            smem.masses = shortlists.masses + int64_t{blockIdx.x} * kWarps * shortlists.width;
        }
        ptx::cp_async_wait<0>();
        __syncthreads();  // the rows have landed

        TileRefinement<Traits> refinement{smem, params, problem.scale * 1.44269504088896341f,
                                          HeldRows<Traits>(smem)};
        refinement.rows.hold([&](int row) {
            return row < refined.rows ? static_cast<int>(query_position(
                                            refined.query(row), problem.query_len, problem.kv_len))
                                      : kNoRow;
        });
        __syncthreads();  // all rows are in registers: the stages are free

        if (keep > 0) {
            refinement.find_norm();
            refinement.find_masses();
            if (warp == 0) choose(smem, smem.histogram[0], smem.list(params), keep);
        }
        if (threadIdx.x == 0) params.block_counts[smem.tile.tile.tile_index] = keep;
        if (params.omitted_mass_estimate) {
            __syncthreads();  // the list is written
            refinement.estimate(smem.list(params), keep);
        }
        __syncthreads();  // the tile's state in shared memory is not read any more
    }
}

}  // namespace condensate::kernels::block_select
