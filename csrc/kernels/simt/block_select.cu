// Block selection on CUDA cores: one CTA per tile, a unit per lane, four pooled queries per warp.
// The units are scored once for the softmax sums and again for the blocks' masses (and a third time
// for the estimate of what was left out); only one mass per block goes to memory.
#include "device/tile_rows.h"
#include "kernels/block_select/pooled_queries.h"
#include "kernels/launch.h"
#include "kernels/simt/key_tile.h"
#include "kernels/token_select/radix.h"

namespace condensate::kernels {
namespace simt {
namespace {

using block_select::PooledRows;

constexpr int kSlabDim = 128;  // channels of the units that are staged at a time
constexpr int kRowSets = 2;    // sets of kCtaRows pooled queries: a tile has at most 64
constexpr int kCtasPerSm = 2;

struct alignas(16) SelectSmem {
    KeyTile<kSlabDim> units;
    float warp_mass[kWarps][kTileKeys];  // per warp: masses of the blocks of 32 units
    uint32_t histogram[kRadixBins];
    RadixRow radix;
    int32_t visible_end[kRowSets * kCtaRows];  // units [0, end) that a pooled query sees
    LaneSum softmax[kRowSets * kCtaRows];      // over the units that count
    // The pooled queries follow: [rows rounded up to 4][summary_dim] float.
    __device__ float* queries() { return reinterpret_cast<float*>(this + 1); }
};

int64_t select_smem_bytes(const BlockSelectParams& params) {
    int group = params.problem.group();
    int64_t rows =
        ceil_div(tile_positions(group) / pool_size(group, kScanPool) * group, kWarpRows) * kWarpRows;
    int64_t dim = summary_dim(params.selector, static_cast<int>(params.problem.head_dim));
    return static_cast<int64_t>(sizeof(SelectSmem)) + rows * dim * 4;
}

int64_t select_ctas(const BlockSelectParams& params, int sm_count) {
    const Problem& p = params.problem;
    int64_t tiles = p.batch * p.kv_heads * num_tiles(p.query_len, p.group());
    return min_i64(tiles, static_cast<int64_t>(kCtasPerSm) * sm_count);
}

// What a tile scores.
template <class T>
struct TileUnits {
    const T* summaries;  // of the KV head
    int dim;             // summary_dim
    int per_block;       // units of a block: a power of two, less than 32
    int64_t num_blocks;  // blocks that some query of the tile may see
    float scale;
    int rows;  // pooled queries

    __device__ TileUnits(const BlockSelectParams& params, const device::TileRows& tile,
                         const PooledRows& pooled)
        : dim(summary_dim(params.selector, static_cast<int>(params.problem.head_dim))),
          per_block(units_per_block(params.selector)),
          scale(params.problem.scale),
          rows(pooled.rows) {
        const Problem& p = params.problem;
        int64_t keys = p.kv_len;
        if (p.causal) keys = max_i64(min_i64(tile.span().last + 1, keys), 0);
        num_blocks = ceil_div(keys, kBlockKeys);
        int64_t head = tile.batch * p.kv_heads + tile.kv_head;
        summaries = static_cast<const T*>(params.summaries) +
                    head * summary_units(params.selector, p.kv_len) * dim;
    }
    __device__ int64_t num_units() const { return num_blocks * per_block; }
};

// One mean query of the tile in float32, rounded to its dtype. Quest's bound is a dot product of
// [max(q,0) | min(q,0)] with [max | min].
template <class T>
__device__ void load_pooled_query(float* query_smem, const BlockSelectParams& params,
                                  const device::TileRows& tile, const PooledRows& pooled, int row) {
    int head_dim = static_cast<int>(params.problem.head_dim);
    int size = pooled.size(tile, row);
    const T* src = nullptr;
    if (size > 0) {
        src = static_cast<const T*>(params.query.data) +
              device::head_offset(params.query, tile.batch, pooled.head(tile, row)) +
              pooled.first_query(tile, row) * params.query.stride_seq;
    }
    for (int d = static_cast<int>(threadIdx.x) % 32; d < head_dim; d += 32) {
        float sum = 0.0f;
        for (int i = 0; i < size; ++i) sum += to_float(src[i * params.query.stride_seq + d]);
        float mean = size > 0 ? to_float(from_float<T>(sum / static_cast<float>(size))) : 0.0f;
        if (params.selector == Selector::kQuest) {
            query_smem[d] = mean < 0.0f ? 0.0f : mean;
            query_smem[head_dim + d] = mean > 0.0f ? 0.0f : mean;
        } else {
            query_smem[d] = mean;
        }
    }
}

// Pooled queries and what they see. Each warp loads the rows that it scores.
template <class T>
__device__ void load_pooled_queries(SelectSmem& smem, const BlockSelectParams& params,
                                    const device::TileRows& tile, const PooledRows& pooled,
                                    const TileUnits<T>& units) {
    Lane lane;
    for (int set = 0; set < kRowSets; ++set) {
        for (int r = 0; r < kWarpRows; ++r) {
            int row = set * kCtaRows + lane.row(r);
            if (row / kWarpRows * kWarpRows >= units.rows) continue;  // none of the four exists
            load_pooled_query<T>(smem.queries() + row * units.dim, params, tile, pooled, row);
            int end = 0;
            if (pooled.size(tile, row) > 0) {
                end = block_select::visible_units(params.problem.ranges(),
                                                  pooled.last_position(tile, row),
                                                  unit_keys(params.selector));
            }
            if (lane.lane == 0) smem.visible_end[row] = end;
        }
    }
    __syncwarp();
}

// Scores of this lane's unit against four rows of each set.
struct UnitScores {
    float score[kRowSets][kWarpRows];
    bool counts[kRowSets][kWarpRows];  // visible, in a block without a non-finite score
};

// Does `flag` hold for no lane of this lane's block?
__device__ __forceinline__ bool none_in_block(bool flag, int per_block) {
    int lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t block_lanes = per_block == 32 ? 0xffffffffu : (1u << per_block) - 1;
    uint32_t lanes = __ballot_sync(0xffffffffu, flag) >> (lane & ~(per_block - 1));
    return (lanes & block_lanes) == 0;
}

// Calls body(scores, unit) for every unit of the tile, 32 at a time. All threads call it, and the
// body too, which may use barriers.
template <class T, class Body>
__device__ __forceinline__ void sweep_units(SelectSmem& smem, const TileUnits<T>& units,
                                            Body&& body) {
    Lane lane;
    for (int64_t first = 0; first < units.num_units(); first += kTileKeys) {
        UnitScores scores = {};
        for (int slab = 0; slab < units.dim; slab += kSlabDim) {
            int dim = min(units.dim - slab, kSlabDim);
            __syncthreads();  // everyone is done with the previous units
            stage_rows(smem.units.element, smem.units.kStride, units.summaries + slab,
                       int64_t{units.dim}, first, units.num_units(), dim);
            __syncthreads();
#pragma unroll
            for (int set = 0; set < kRowSets; ++set) {
                int row = set * kCtaRows + lane.row(0);
                if (row >= units.rows) continue;
                accumulate_products(scores.score[set], smem.queries() + row * units.dim + slab,
                                    units.dim, smem.units.element + lane.lane * smem.units.kStride,
                                    dim);
            }
        }
        int64_t unit = first + lane.lane;
#pragma unroll
        for (int set = 0; set < kRowSets; ++set) {
            if (set * kCtaRows + lane.row(0) >= units.rows) continue;
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                float score = __fmul_rn(scores.score[set][r], units.scale);
                bool visible = unit < smem.visible_end[set * kCtaRows + lane.row(r)];
                scores.score[set][r] = score;
                scores.counts[set][r] =
                    none_in_block(visible && !isfinite(score), units.per_block) && visible;
            }
        }
        body(scores, unit);
    }
}

// Sums over the lanes of a block; every lane of the block gets the sum.
__device__ __forceinline__ float block_sum(float x, int per_block) {
    for (int offset = 1; offset < per_block; offset *= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

// Softmax sums of this warp's rows.
template <class T>
__device__ __forceinline__ void sum_rows(SelectSmem& smem, const TileUnits<T>& units) {
    LaneSum sums[kRowSets][kWarpRows];
    sweep_units(smem, units, [&](const UnitScores& scores, int64_t) {
#pragma unroll
        for (int set = 0; set < kRowSets; ++set)
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r)
                if (scores.counts[set][r]) sums[set][r].add(scores.score[set][r]);
    });
    Lane lane;
#pragma unroll
    for (int set = 0; set < kRowSets; ++set) {
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            LaneSum row = sums[set][r].over_warp();
            if (lane.lane == 0) smem.softmax[set * kCtaRows + lane.row(r)] = row;
        }
    }
    __syncwarp();
}

// The part of a row's softmax sum that this lane's unit holds.
__device__ __forceinline__ float unit_weight(const UnitScores& scores, int set, int r,
                                             const LaneSum& row) {
    return scores.counts[set][r] ? expf(scores.score[set][r] - row.largest) : 0.0f;
}

// mass[block] = the largest mass that any row gives the block; -1 where it is not eligible.
template <class T>
__device__ __forceinline__ void find_masses(float* mass, SelectSmem& smem,
                                            const TileUnits<T>& units, const Ranges& ranges,
                                            TileSpan span) {
    Lane lane;
    sweep_units(smem, units, [&](const UnitScores& scores, int64_t unit) {
        float largest = 0.0f;
#pragma unroll
        for (int set = 0; set < kRowSets; ++set) {
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                const LaneSum& row = smem.softmax[set * kCtaRows + lane.row(r)];
                float sum = block_sum(unit_weight(scores, set, r, row), units.per_block);
                if (sum > 0.0f) largest = fmaxf(largest, sum / row.sum);
            }
        }
        if (lane.lane % units.per_block == 0) {
            smem.warp_mass[lane.warp][lane.lane / units.per_block] = largest;
        }
        __syncthreads();
        // The sweep's barriers keep the next units' masses from these reads.
        int slot = static_cast<int>(threadIdx.x);
        int64_t block = (unit - lane.lane) / units.per_block + slot;
        if (slot < kTileKeys / units.per_block && block < units.num_blocks) {
            float tile_mass = 0.0f;
            for (int warp = 0; warp < kWarps; ++warp) {
                tile_mass = fmaxf(tile_mass, smem.warp_mass[warp][slot]);
            }
            mass[block] = is_eligible(ranges, span, block) ? tile_mass : -1.0f;
        }
    });
    __syncthreads();
}

// Finds the mass of the max_blocks-th eligible block; kNoPrefix when there are fewer.
__device__ void find_smallest_mass(SelectSmem& smem, const float* mass, int64_t blocks,
                                   int64_t max_blocks) {
    int thread = static_cast<int>(threadIdx.x);
    for (int bin = thread; bin < kRadixBins; bin += kThreads) smem.histogram[bin] = 0;
    if (thread == 0) smem.radix = {0, static_cast<uint32_t>(min_i64(max_blocks, INT_MAX)), 0};
    __syncthreads();
    for (int pass = 0; pass < kRadixPasses; ++pass) {
        RadixRow row = smem.radix;
        if (row.prefix == kNoPrefix) return;
        int digit_shift = 32 - kRadixBits * (pass + 1);
        for (int64_t block = thread; block < blocks; block += kThreads) {
            if (mass[block] < 0.0f) continue;
            uint32_t leading = ordered_key(mass[block]) >> digit_shift;
            if (leading >> kRadixBits == row.prefix) {
                atomicAdd(&smem.histogram[leading % kRadixBins], 1u);
            }
        }
        __syncthreads();
        if (thread < 32) {
            RadixRow next = narrow_row(row, smem.histogram, pass);
            if (thread == 0) smem.radix = next;
        }
        __syncthreads();
    }
}

// Writes the list, ascending, and marks what it takes by a mass of -1. One warp calls it.
__device__ void write_list(const RadixRow& smallest, float* mass, int64_t blocks,
                           int64_t max_blocks, int32_t* indices, int32_t* count) {
    int lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t before = (1u << lane) - 1;
    bool all = smallest.prefix == kNoPrefix;
    uint32_t ties_left = smallest.remaining;
    int64_t taken = 0;
    for (int64_t base = 0; base < blocks && max_blocks > 0; base += 32) {
        int64_t block = base + lane;
        float own = block < blocks ? mass[block] : -1.0f;
        uint32_t key = ordered_key(own);
        bool eligible = own >= 0.0f;
        bool tie = eligible && !all && key == smallest.prefix;
        uint32_t ties = __ballot_sync(0xffffffffu, tie);
        bool take = eligible && (all || key > smallest.prefix);
        take |= tie && static_cast<uint32_t>(__popc(ties & before)) < ties_left;
        ties_left -= min(ties_left, static_cast<uint32_t>(__popc(ties)));
        uint32_t takes = __ballot_sync(0xffffffffu, take);
        if (take) {
            indices[taken + __popc(takes & before)] = static_cast<int32_t>(block);
            mass[block] = -1.0f;
        }
        taken += __popc(takes);
    }
    for (int64_t i = taken + lane; i < max_blocks; i += 32) indices[i] = -1;
    if (lane == 0) *count = static_cast<int32_t>(taken);
}

// One minus the mass that is listed or not eligible: the mass of the eligible blocks left out.
template <class T>
__device__ __forceinline__ void write_estimate(const BlockSelectParams& params, const float* mass,
                                               SelectSmem& smem, const TileUnits<T>& units,
                                               const device::TileRows& tile,
                                               const PooledRows& pooled) {
    Lane lane;
    float left_out[kRowSets][kWarpRows] = {};
    sweep_units(smem, units, [&](const UnitScores& scores, int64_t unit) {
        int64_t block = unit / units.per_block;
        if (block >= units.num_blocks || mass[block] < 0.0f) return;
#pragma unroll
        for (int set = 0; set < kRowSets; ++set)
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r)
                left_out[set][r] +=
                    unit_weight(scores, set, r, smem.softmax[set * kCtaRows + lane.row(r)]);
    });
#pragma unroll
    for (int set = 0; set < kRowSets; ++set) {
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            int row = set * kCtaRows + lane.row(r);
            float part = warp_sum(left_out[set][r]);
            if (lane.lane >= pooled.size(tile, row)) continue;
            float sum = smem.softmax[row].sum;
            int64_t head = tile.batch * params.problem.query_heads + pooled.head(tile, row);
            int64_t query = pooled.first_query(tile, row) + lane.lane;
            params.omitted_mass_estimate[head * params.problem.query_len + query] =
                sum > 0.0f ? part / sum : 0.0f;
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    block_select_kernel(const __grid_constant__ BlockSelectParams params,
                        const __grid_constant__ int64_t num_tiles) {
    extern __shared__ __align__(16) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<SelectSmem*>(smem_bytes);
    const Problem& problem = params.problem;
    float* mass = static_cast<float*>(params.workspace) + blockIdx.x * num_blocks(problem.kv_len);
    for (int64_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        __syncthreads();  // everyone is done with the previous tile
        device::TileRows tile = device::TileRows::from_index(problem, index);
        PooledRows pooled(tile);
        TileUnits<T> units(params, tile, pooled);
        load_pooled_queries(smem, params, tile, pooled, units);

        sum_rows(smem, units);
        find_masses(mass, smem, units, problem.ranges(), tile.span());
        find_smallest_mass(smem, mass, units.num_blocks, params.max_blocks);
        if (threadIdx.x < 32) {
            write_list(smem.radix, mass, units.num_blocks, params.max_blocks,
                       params.block_indices + tile.tile_index * params.max_blocks,
                       params.block_counts + tile.tile_index);
        }
        if (params.omitted_mass_estimate == nullptr) continue;
        __syncthreads();  // the list's marks are seen by all
        write_estimate(params, mass, smem, units, tile, pooled);
    }
}

}  // namespace
}  // namespace simt

int64_t block_select_simt_workspace_bytes(const BlockSelectParams& params, int sm_count) {
    return simt::select_ctas(params, sm_count) * num_blocks(params.problem.kv_len) * 4;
}

Status block_select_simt(const BlockSelectParams& params, const LaunchContext& context) {
    const Problem& p = params.problem;
    int64_t tiles = p.batch * p.kv_heads * num_tiles(p.query_len, p.group());
    return with_element_type(p.dtype, [&](auto tag) {
        return launch(simt::block_select_kernel<typename decltype(tag)::type>, "block_select_simt",
                      {simt::select_ctas(params, context.sm_count)}, simt::kThreads,
                      simt::select_smem_bytes(params), context, params, tiles);
    });
}

}  // namespace condensate::kernels
