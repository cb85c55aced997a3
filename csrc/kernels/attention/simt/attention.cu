// Softmax attention on CUDA cores: every element type, stride and alignment, float32 arithmetic.
// A CTA takes 32 rows of a tile and walks the blocks that the tile attends, 32 keys at a time: keys
// are staged and scored (one key per lane), then values are staged in the same memory and added up
// (some channels per lane).
#include "condensate/omitted_estimate.h"
#include "device/simt/key_tile.h"
#include "device/tile_walk.h"
#include "kernels/attention/simt/far_rows.h"
#include "kernels/launch.h"

namespace condensate::kernels {
namespace simt {
namespace {

// What decides which keys a row attends.
struct RowSupport {
    int64_t position;
    float threshold;  // NaN: no key is selected by its score
    int32_t tie_index;

    __device__ bool attends(const Ranges& ranges, int64_t key, bool listed, float score) const {
        if (!is_visible(ranges, position, key)) return false;
        return in_support(ranges, position, key, listed) || score > threshold ||
               (score == threshold && key <= tie_index);
    }
};

template <int kDim>
struct AttentionSmem {
    float queries[kCtaRows * kDim];
    float weights[kWarps][kTileKeys][kWarpRows];
    RowSupport supports[kCtaRows];
    FarSmem far;
    KeyTile<kDim> tile;  // keys, then values
};

// A row's running softmax; the same on all lanes but for `sum`, a lane's own share, and `out`, a
// lane's channels lane + 32 c.
template <int kDim>
struct RowState {
    float largest = -INFINITY;
    float sum = 0.0f;
    float out[kDim / 32] = {};
    float block_scores = 0.0f, block_weights = 0.0f;  // of a sampled block: a lane's share
    OmittedEstimate<float> omitted;                   // a lane's share

    // Takes in one score per lane (-inf: not attended) and returns its weight.
    __device__ __forceinline__ float weigh(float score) {
        float previous = largest;
        largest = fmaxf(previous, warp_max(score));
        float reference = finite_reference(largest);
        float weight = expf(score - reference);
        if (largest != previous) {
            float rescale = expf(previous - reference);
            sum *= rescale;
            block_weights *= rescale;
            omitted.rescale(rescale);
#pragma unroll
            for (int c = 0; c < kDim / 32; ++c) out[c] *= rescale;
        }
        sum += weight;
        return weight;
    }

    // A sampled block's keys, as they pass by, and its end.
    __device__ __forceinline__ void sample(float score, float weight) {
        block_scores += score;
        block_weights += weight;
    }
    __device__ __forceinline__ void end_block() {
        const float weight = warp_sum(block_weights);
        if (weight >= kGapLeastWeight)
            omitted.add_block((log2f(weight) + largest * device::kLog2E) / 32,
                              block_scores * (device::kLog2E / kBlockKeys));
        block_scores = block_weights = 0.0f;
    }
    // The omitted mass, estimated; the warp calls it.
    __device__ __forceinline__ float omitted_share() const {
        const OmittedEstimate<float> whole = {warp_sum(omitted.pools), warp_sum(omitted.gaps),
                                              omitted.blocks};
        return whole.share(warp_sum(sum));
    }
};

// The rows of a CTA: up to 32 consecutive (query, head of the group) pairs of a tile, so that rows
// without a query come last.
struct AttentionCta {
    Tile tile;
    int first_row;  // in the tile's pairs

    // `parts` CTAs share the rows of a tile.
    __device__ AttentionCta(const Problem& problem, int parts)
        : tile(Tile::longest_first(problem, blockIdx.x / parts)),
          first_row(static_cast<int>(blockIdx.x % parts) * kCtaRows) {}

    __device__ int64_t query(int row) const {
        return tile.first_query + (first_row + row) / tile.group;
    }
    __device__ int head(int row) const {
        return tile.kv_head * tile.group + (first_row + row) % tile.group;
    }
    __device__ bool exists(int row) const {
        return first_row + row < tile.rows() && query(row) < tile.query_len;
    }
    __device__ int64_t flat_row(const Problem& p, int row) const {
        return tile.flat_query(p, head(row), query(row));
    }
};

// Reads this warp's queries and supports. A row that does not exist takes part with a query of
// zeros and is not stored.
template <class T, int kDim>
__device__ __forceinline__ void load_rows(AttentionSmem<kDim>& smem, const AttentionParams& params,
                                          const AttentionCta& cta) {
    const Problem& problem = params.problem;
    Lane lane;
#pragma unroll 1
    for (int r = 0; r < kWarpRows; ++r) {
        int row = lane.row(r);
        RowSupport support = {cta.tile.position_of(cta.query(row)), NAN, -1};
        const T* src = nullptr;
        if (cta.exists(row)) {
            src = static_cast<const T*>(params.query.data) +
                  params.query.offset(cta.tile.batch, cta.head(row), cta.query(row));
            if (params.threshold) {
                support.threshold = params.threshold[cta.flat_row(problem, row)];
                support.tie_index = params.tie_index[cta.flat_row(problem, row)];
            }
        }
        load_query(smem.queries + row * kDim, src, static_cast<int>(problem.head_dim));
        if (lane.lane == 0) smem.supports[row] = support;
    }
    __syncwarp();
}

// out += weights * values of the staged keys. A weight of 0 keeps out whatever the value holds.
template <int kDim>
__device__ __forceinline__ void add_values(RowState<kDim> (&states)[kWarpRows],
                                           const AttentionSmem<kDim>& smem) {
    Lane lane;
#pragma unroll 1
    for (int key = 0; key < kTileKeys; ++key) {
        const float (&weights)[kWarpRows] = smem.weights[lane.warp][key];
        const float* value = smem.tile.element + key * smem.tile.kStride + lane.lane;
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            float weight = weights[r];
            if (weight == 0.0f) continue;
#pragma unroll
            for (int c = 0; c < kDim / 32; ++c) {
                states[r].out[c] = fmaf(weight, value[32 * c], states[r].out[c]);
            }
        }
    }
}

template <class T, int kDim>
__device__ __forceinline__ void store_rows(const RowState<kDim> (&states)[kWarpRows],
                                           const AttentionParams& params, const AttentionCta& cta) {
    const Problem& problem = params.problem;
    Lane lane;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        const RowState<kDim>& state = states[r];
        float sum = warp_sum(state.sum);
        int row = lane.row(r);
        if (!cta.exists(row)) continue;
        int64_t flat = cta.flat_row(problem, row);
        T* out = static_cast<T*>(params.out) + flat * problem.head_dim;
#pragma unroll
        for (int c = 0; c < kDim / 32; ++c) {
            int d = lane.lane + 32 * c;
            if (d < problem.head_dim) {
                out[d] = from_float<T>(sum == 0.0f ? 0.0f : state.out[c] / sum);
            }
        }
        if (params.lse && lane.lane == 0) {
            params.lse[flat] = sum == 0.0f ? -INFINITY : state.largest + logf(sum);
        }
        if (params.omitted_mass_estimate) {
            const float share = state.omitted_share();
            if (lane.lane == 0) params.omitted_mass_estimate[flat] = share;
        }
    }
}

// Attends to the 32 keys from `first` on. All threads of the CTA call it.
template <class T, int kDim>
__device__ __forceinline__ void attend_keys(RowState<kDim> (&states)[kWarpRows],
                                            AttentionSmem<kDim>& smem,
                                            const AttentionParams& params, const AttentionCta& cta,
                                            int64_t first, bool listed, bool sampled) {
    const Problem& problem = params.problem;
    const Tile& tile = cta.tile;
    const Ranges ranges = tile.ranges(problem);
    int head_dim = static_cast<int>(problem.head_dim);
    const KvView keys = KvView::of(params.key, sizeof(T), tile.batch, tile.kv_head);
    const KvView values = KvView::of(params.value, sizeof(T), tile.batch, tile.kv_head);
    Lane lane;
    constexpr int kStride = KeyTile<kDim>::kStride;

    __syncthreads();  // everyone is done with the previous values
    stage_rows<T>(smem.tile.element, kStride, keys, first, tile.kv_len, head_dim);
    __syncthreads();
    float score[kWarpRows];
    score_rows(score, smem.queries + lane.row(0) * kDim, kDim,
               smem.tile.element + lane.lane * kStride, head_dim, problem.scale);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        bool attended =
            smem.supports[lane.row(r)].attends(ranges, first + lane.lane, listed, score[r]);
        const float weight = states[r].weigh(attended ? score[r] : -INFINITY);
        smem.weights[lane.warp][lane.lane][r] = weight;
        if (sampled) states[r].sample(score[r], weight);
    }
    __syncthreads();  // everyone is done with the keys; the warp's weights are written
    stage_rows<T>(smem.tile.element, kStride, values, first, tile.kv_len, head_dim);
    __syncthreads();
    add_values(states, smem);
}

// Attends to the 32 pooled rows from `first` on. All threads of the CTA call it.
template <class T, int kDim>
__device__ __forceinline__ void attend_pools(RowState<kDim> (&states)[kWarpRows],
                                             AttentionSmem<kDim>& smem,
                                             const AttentionParams& params, int head,
                                             const device::FarTile& far, int first) {
    const Problem& problem = params.problem;
    Lane lane;
    float* tile = smem.tile.element;
    constexpr int kStride = KeyTile<kDim>::kStride;

    __syncthreads();  // everyone is done with the previous values
    stage_pools<T, kDim>(tile, smem.far, params, head, far, 0, first);
    __syncthreads();
    float score[kWarpRows];
    score_rows(score, smem.queries + lane.row(0) * kDim, kDim, tile + lane.lane * kStride,
               static_cast<int>(problem.head_dim), problem.scale);
    const int keys = smem.far.keys[lane.lane];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        float weighted = keys > 0 ? score[r] + logf(static_cast<float>(keys)) : -INFINITY;
        const float weight = states[r].weigh(weighted);
        smem.weights[lane.warp][lane.lane][r] = weight;
        states[r].omitted.add_pools(weight);
    }
    __syncthreads();  // everyone is done with the keys; the warp's weights are written
    stage_pools<T, kDim>(tile, smem.far, params, head, far, 1, first);
    __syncthreads();
    add_values(states, smem);
}

// 256 channels take more registers than two CTAs leave each other.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 128 ? 2 : 1)
    attention_simt_kernel(const __grid_constant__ AttentionParams params,
                          const __grid_constant__ int parts, uint32_t* error_word) {
    extern __shared__ __align__(16) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<AttentionSmem<kDim>*>(smem_bytes);
    const Problem& problem = params.problem;
    AttentionCta cta(problem, parts);
    if (!cta.exists(0)) return;  // the tile's last rows do not exist

    RowState<kDim> states[kWarpRows];
    load_rows<T, kDim>(smem, params, cta);

    const Ranges ranges = cta.tile.ranges(problem);
    const TileSpan span = cta.tile.span();
    const bool has_far = params.far_field.key.given();
    AttentionWalk walk(
        params, cta.tile,
        {has_far, params.threshold != nullptr, params.omitted_mass_estimate != nullptr});
    for (AttentionWalk::Step step = walk.next(); step.block != INT_MAX; step = walk.next()) {
        int64_t begin = int64_t{step.block} * kBlockKeys;
        for (int64_t first = begin; first < begin + kBlockKeys; first += kTileKeys) {
            if (first >= ranges.kv_len || (problem.causal && first > span.last)) break;
            attend_keys<T, kDim>(states, smem, params, cta, first, step.whole, step.sampled);
        }
        if (step.sampled)
            for (RowState<kDim>& state : states) state.end_block();
    }
    if (has_far) {
        const device::FarTile far(device::FarShape::of(ranges.kv_len), ranges, span);
        if (threadIdx.x < 32) smem.far.walk.record(params, cta.tile, far.end);
        __syncthreads();  // all see it
        for (int first = 0; first < far.pools(); first += kTileKeys)
            attend_pools<T, kDim>(states, smem, params, cta.tile.flat_kv_head(problem), far, first);
    }
    store_rows<T, kDim>(states, params, cta);
    if (walk.errors() && threadIdx.x == 0) atomicOr(error_word, walk.errors());
}

template <class T, int kDim>
Status launch_attention(const AttentionParams& params, const LaunchContext& context) {
    const Problem& p = params.problem;
    int tile_rows = tile_positions(p.group()) * p.group();
    int parts = static_cast<int>(ceil_div(tile_rows, kCtaRows));
    Grid grid = {p.batch * p.kv_heads * num_tiles(p.query_len, p.group()) * parts};
    return launch(attention_simt_kernel<T, kDim>, "attention_simt", grid, kThreads,
                  sizeof(AttentionSmem<kDim>), context, params, parts, context.error_word);
}

}  // namespace
}  // namespace simt

Status attention_simt(const AttentionParams& params, const LaunchContext& context) {
    return with_element_type(params.problem.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (params.problem.head_dim <= 64) return simt::launch_attention<T, 64>(params, context);
        if (params.problem.head_dim <= 128) return simt::launch_attention<T, 128>(params, context);
        return simt::launch_attention<T, 256>(params, context);
    });
}

}  // namespace condensate::kernels
