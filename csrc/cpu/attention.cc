// Attention tile by tile: the rows of a tile share the blocks they visit, so keys and values are
// converted to float32 once per tile and block, and the inner loops are two dense products.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "condensate/block_walk.h"
#include "condensate/omitted_estimate.h"
#include "cpu/far_tile.h"
#include "cpu/kernels.h"
#include "cpu/row_mask.h"

namespace condensate::cpu {
namespace {

constexpr double kLog2E = 1.44269504088896341;

struct Scratch {
    Scratch(Arena& arena, const Problem& p)
        : rows(arena, p.head_dim),
          value_ld(ceil_div(p.head_dim, kPanelRows) * kPanelRows),
          keys(arena.take<float>(kTileKeys * p.head_dim)),
          values(arena.take<float>(kTileKeys * value_ld)),
          scores(arena.take<float>(kTileKeys * kScoreStride)),
          out(arena.take<float>(kMaxRows * value_ld)),
          threshold(arena.take<float>(kMaxRows)),
          tie_index(arena.take<int32_t>(kMaxRows)),
          mask(arena.take<RowMask>(1)),
          state(arena.take<SoftmaxState>(1)),
          line(arena.take<float>(p.head_dim)),
          omitted(arena.take<OmittedEstimate<double>>(kMaxRows)),
          walked(arena.take<int32_t>(num_blocks(p.kv_len))) {}

    QueryRows rows;
    int64_t value_ld;
    float* keys;
    float* values;
    float* scores;
    float* out;  // [row][value_ld], not yet divided by the softmax sum
    float* threshold;
    int32_t* tie_index;
    RowMask* mask;
    SoftmaxState* state;
    float* line;                       // one row of the far field's means
    OmittedEstimate<double>* omitted;  // [row]
    int32_t* walked;                   // the blocks that the tile has walked
};

class TileAttention {
  public:
    TileAttention(const AttentionParams& params, const TileOps& ops, int64_t item, Scratch& scratch)
        : params_(params),
          p_(params.problem),
          ops_(ops),
          s_(scratch),
          tile_(p_, item / num_tiles(p_.query_len, p_.group()),
                item % num_tiles(p_.query_len, p_.group())),
          keys_(view_of(params.key, p_, tile_.batch, tile_.kv_head)),
          values_(view_of(params.value, p_, tile_.batch, tile_.kv_head)) {
        s_.rows.clear();
        for (int64_t h = tile_.first_head(); h < tile_.end_head(); ++h)
            for (int64_t i = tile_.first_query; i < tile_.end_query(); ++i)
                s_.rows.add(tile_, h, i);
    }

    // Returns the ErrorBits of this tile's list.
    uint32_t run() {
        load_rows();
        AttentionWalk walk(params_, tile_, {has_far_field(), has_threshold(), wants_estimate()});
        int64_t walked = 0;
        for (AttentionWalk::Step step = walk.next(); step.block != INT_MAX; step = walk.next()) {
            s_.walked[walked++] = step.block;
            visit(step);
        }
        if (has_far_field()) visit_far_field({s_.walked, s_.walked + walked});
        store_rows();
        return walk.errors();
    }

  private:
    bool has_threshold() const { return params_.threshold != nullptr; }
    bool has_far_field() const { return params_.far_field.key.given(); }
    bool wants_estimate() const { return params_.omitted_mass_estimate != nullptr; }
    int64_t row_index(int row) const {
        return tile_.flat_query(p_, s_.rows.head[row], s_.rows.query[row]);
    }

    void load_rows() {
        s_.rows.load(ops_, p_, params_.query, tile_.batch);
        for (int row = 0; row < kMaxRows; ++row) {
            s_.state->max[row] = -INFINITY;
            s_.state->sum[row] = s_.state->sum_error[row] = 0.0f;
            s_.omitted[row] = {};
        }
        for (int64_t n = 0; n < s_.rows.panel_count() * kPanelRows * s_.value_ld; ++n)
            s_.out[n] = 0.0f;
        for (int row = 0; has_threshold() && row < s_.rows.count; ++row) {
            s_.threshold[row] = params_.threshold[row_index(row)];
            s_.tie_index[row] = params_.tie_index[row_index(row)];
        }
    }

    void visit(const AttentionWalk::Step& step) {
        const int64_t begin = int64_t{step.block} * kBlockKeys;
        const int dim = static_cast<int>(p_.head_dim), panels = s_.rows.panel_count();
        load_tile(ops_, p_, keys_, tile_.kv_len, begin, dim, s_.keys);
        ops_.score(s_.rows.panels, s_.keys, dim, dim, panels, p_.scale, s_.scores);
        if (!step.full) {
            fill_mask(tile_.ranges(p_), s_.rows, step.block, step.whole,
                      has_threshold() ? s_.threshold : nullptr, s_.tie_index, s_.mask);
            ops_.mask(*s_.mask, panels, s_.scores);
        }
        if (step.sampled) add_gaps(panels);
        ops_.softmax(panels, s_.scores, s_.state);
        accumulate(load_tile(ops_, p_, values_, tile_.kv_len, begin, static_cast<int>(s_.value_ld),
                             s_.values));
    }

    // Adds the Jensen gap of the 64 keys whose scores are at hand to the rows that count it.
    void add_gaps(int panels) {
        const int rows = panels * kPanelRows;
        int32_t all[kMaxRows];
        float max[kMaxRows], sum[kMaxRows];
        std::fill(all, all + rows, kTileKeys);
        ops_.block_sums(s_.scores, kTileKeys, all, panels, max, sum);
        for (int row = 0; row < rows; ++row) {
            const float largest = std::max(s_.state->max[row], max[row]);
            if (!(sum[row] * std::exp(max[row] - largest) >= kGapLeastWeight)) continue;
            double scores = 0.0;
            for (int key = 0; key < kTileKeys; ++key) scores += s_.scores[key * kScoreStride + row];
            s_.omitted[row].add_block(kLog2E * (max[row] + std::log(sum[row])),
                                      kLog2E * scores / kTileKeys);
        }
    }

    // What the walk left out, kTileKeys pools at a time: every row sees all of their keys.
    void visit_far_field(WalkedBlocks walked) {
        FarTile far(params_, ops_, tile_, walked, s_.line);
        const int dim = static_cast<int>(p_.head_dim), panels = s_.rows.panel_count();
        for (int64_t first = 0; first < far.pools(); first += kTileKeys) {
            int64_t keys[kTileKeys];
            const int64_t all_keys = load_pools(far, first, keys);
            if (all_keys == 0) continue;
            ops_.score(s_.rows.panels, s_.keys, dim, dim, panels, p_.scale, s_.scores);
            count_keys(keys, panels);
            ops_.softmax(panels, s_.scores, s_.state);
            if (wants_estimate()) add_pools();
            accumulate(all_finite(s_.values, kTileKeys * s_.value_ld));
        }
    }

    // Adds the pools' weights at hand to the rows' estimates.
    void add_pools() {
        float weights[kMaxRows] = {};
        for (int n = 0; n < kTileKeys; ++n)
            for (int row = 0; row < s_.rows.count; ++row)
                weights[row] += s_.scores[n * kScoreStride + row];
        for (int row = 0; row < s_.rows.count; ++row) {
            s_.omitted[row].rescale(s_.state->rescale[row]);
            s_.omitted[row].add_pools(weights[row]);
        }
    }

    // Mean rows of pools first.. and the number of keys of each; returns the number of them all.
    int64_t load_pools(FarTile& far, int64_t first, int64_t (&keys)[kTileKeys]) {
        int64_t all_keys = 0;
        for (int n = 0; n < kTileKeys; ++n) {
            float* key = s_.keys + n * p_.head_dim;
            float* value = s_.values + n * s_.value_ld;
            keys[n] = far.load(first + n, key, value, s_.value_ld);
            all_keys += keys[n];
        }
        return all_keys;
    }

    // A pool of n keys weighs n * exp(score), one without keys nothing.
    void count_keys(const int64_t (&keys)[kTileKeys], int panels) {
        for (int n = 0; n < kTileKeys; ++n) {
            const float bias = std::log(static_cast<float>(keys[n]));
            float* scores = s_.scores + n * kScoreStride;
            for (int row = 0; row < panels * kPanelRows; ++row)
                scores[row] = keys[n] > 0 ? scores[row] + bias : -INFINITY;
        }
    }

    static bool all_finite(const float* numbers, int64_t count) {
        float probe = 0.0f;  // stays 0 unless a number is not finite
        for (int64_t n = 0; n < count; ++n) probe += numbers[n] * 0.0f;
        return probe == 0.0f;
    }

    // Adds the weighted values of the 64 keys or pools at hand; `finite`: all values are.
    void accumulate(bool finite) {
        const int ld = static_cast<int>(s_.value_ld);
        if (finite)
            ops_.accumulate(s_.scores, s_.values, ld, s_.rows.count, s_.state->rescale, s_.out);
        else
            accumulate_nonzero();
    }

    // With infinite or NaN values, a key that a row does not attend must not add 0 * inf.
    void accumulate_nonzero() {
        for (int row = 0; row < s_.rows.count; ++row) {
            float* out = s_.out + row * s_.value_ld;
            for (int64_t d = 0; d < p_.head_dim; ++d) out[d] *= s_.state->rescale[row];
            for (int key = 0; key < kTileKeys; ++key) {
                float weight = s_.scores[key * kScoreStride + row];
                if (weight == 0.0f) continue;
                const float* value = s_.values + key * s_.value_ld;
                for (int64_t d = 0; d < p_.head_dim; ++d) out[d] += weight * value[d];
            }
        }
    }

    void store_rows() {
        for (int row = 0; row < s_.rows.count; ++row) {
            const float sum = s_.state->sum[row];
            const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // nothing attended: output 0
            const int64_t at = row_index(row);
            const float* out = s_.out + row * s_.value_ld;
            for (int64_t d = 0; d < p_.head_dim; ++d)
                store_number(p_.dtype, params_.out, at * p_.head_dim + d, out[d] * inverse);
            if (params_.lse != nullptr) params_.lse[at] = s_.state->max[row] + std::log(sum);
            if (wants_estimate()) params_.omitted_mass_estimate[at] = s_.omitted[row].share(sum);
        }
    }

    const AttentionParams& params_;
    const Problem& p_;
    const TileOps& ops_;
    Scratch& s_;
    const Tile tile_;
    const KvView keys_, values_;
};

}  // namespace

Status attention(const AttentionParams& params, const Executor& executor, uint32_t* errors) {
    const Problem& p = params.problem;
    const TileOps& ops = tile_ops();
    std::atomic<uint32_t> all_errors{0};
    Status status = for_each_item(
        executor, p.batch * p.kv_heads * num_tiles(p.query_len, p.group()),
        [&](Arena& arena) { return Scratch(arena, p); },
        [&](int64_t item, Scratch& scratch) {
            uint32_t bits = TileAttention(params, ops, item, scratch).run();
            if (bits != 0) all_errors.fetch_or(bits, std::memory_order_relaxed);
        });
    *errors |= all_errors.load(std::memory_order_relaxed);
    return status;
}

}  // namespace condensate::cpu
