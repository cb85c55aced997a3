// The exact audit: the softmax sum over all visible keys of every audited row, values untouched.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/row_mask.h"

namespace condensate::cpu {
namespace {

struct Scratch {
    Scratch(Arena& arena, const Problem& p)
        : rows(arena, p.head_dim),
          slot(arena.take<int64_t>(kMaxRows)),
          keys(arena.take<float>(kTileKeys * p.head_dim)),
          scores(arena.take<float>(kTileKeys * kScoreStride)),
          mask(arena.take<RowMask>(1)),
          state(arena.take<SoftmaxState>(1)) {}

    QueryRows rows;
    int64_t* slot;  // where a row's result goes in [R]
    float* keys;
    float* scores;
    RowMask* mask;
    SoftmaxState* state;
};

// 1 - exp(lse - lse_full) in [0, 1]; 0 for a row that sees nothing; NaN spreads.
float omitted_from_lse(float lse, float lse_full) {
    if (lse == lse_full) return 0.0f;
    float omitted = -std::expm1(lse - lse_full);
    if (omitted < 0.0f) return 0.0f;  // rounding of two nearly equal LSEs
    return omitted > 1.0f ? 1.0f : omitted;
}

// Softmax state of the rows over every visible key.
void sweep_keys(const OmittedMassParams& params, const TileOps& ops, const Sequence& sequence,
                int64_t batch, int64_t kv_head, Scratch& s) {
    const Problem& p = params.problem;
    const Ranges everything{sequence.kv_len, 0, sequence.kv_len, p.causal};
    const KvView keys = view_of(params.key, p, batch, kv_head);
    const int dim = static_cast<int>(p.head_dim), panels = s.rows.panel_count();
    s.rows.load(ops, p, params.query, batch);
    for (int row = 0; row < kMaxRows; ++row) {
        s.state->max[row] = -INFINITY;
        s.state->sum[row] = s.state->sum_error[row] = 0.0f;
    }
    const TileSpan span{s.rows.first_position(), s.rows.last_position()};
    const BlockRange blocks = anchor_blocks(everything, span);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        load_tile(ops, p, keys, sequence.kv_len, block * kBlockKeys, dim, s.keys);
        ops.score(s.rows.panels, s.keys, dim, dim, panels, p.scale, s.scores);
        if (block_cover(everything, span, block, false) != BlockCover::kFull) {
            fill_mask(everything, s.rows, block, false, nullptr, nullptr, s.mask);
            ops.mask(*s.mask, panels, s.scores);
        }
        ops.softmax(panels, s.scores, s.state);
    }
}

// Audits rows [begin, end) of the (slot, head) pairs of one KV head. Returns ErrorBits.
uint32_t audit(const OmittedMassParams& params, const TileOps& ops, int64_t batch, int64_t kv_head,
               int64_t begin, int64_t end, Scratch& s) {
    const Problem& p = params.problem;
    const Sequence sequence(p, batch);
    const int group = p.group();
    uint32_t errors = 0;
    s.rows.clear();
    for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t head = kv_head * group + pair % group, slot = pair / group;
        const int64_t query = params.rows != nullptr ? params.rows[slot] : slot;
        if (query >= 0 && query < sequence.query_len) {
            s.slot[s.rows.count] = slot;
            s.rows.add(sequence, head, query);
            continue;
        }
        errors |= kErrorRowIndex;
        params.omitted[(batch * p.query_heads + head) * params.num_rows + slot] = NAN;
    }
    if (s.rows.count == 0) return errors;
    sweep_keys(params, ops, sequence, batch, kv_head, s);
    for (int row = 0; row < s.rows.count; ++row) {
        const int64_t head = batch * p.query_heads + s.rows.head[row];
        const float lse_full = s.state->max[row] + std::log(s.state->sum[row]);
        params.omitted[head * params.num_rows + s.slot[row]] =
            omitted_from_lse(params.lse[head * p.query_len + s.rows.query[row]], lse_full);
    }
    return errors;
}

}  // namespace

Status omitted_mass(const OmittedMassParams& params, const Executor& executor, uint32_t* errors) {
    const Problem& p = params.problem;
    const TileOps& ops = tile_ops();
    const int64_t pairs = params.num_rows * p.group(), chunks = ceil_div(pairs, kMaxRows);
    std::atomic<uint32_t> all_errors{0};
    Status status = for_each_item(
        executor, p.batch * p.kv_heads * chunks, [&](Arena& arena) { return Scratch(arena, p); },
        [&](int64_t item, Scratch& scratch) {
            const int64_t begin = item % chunks * kMaxRows;
            uint32_t bits =
                audit(params, ops, item / chunks / p.kv_heads, item / chunks % p.kv_heads, begin,
                      min_i64(begin + kMaxRows, pairs), scratch);
            if (bits != 0) all_errors.fetch_or(bits, std::memory_order_relaxed);
        });
    *errors |= all_errors.load(std::memory_order_relaxed);
    return status;
}

Status omitted_from_lse(const OmittedFromLseParams& params, const Executor&) {
    for (int64_t row = 0; row < params.rows; ++row)
        params.omitted[row] = omitted_from_lse(params.lse[row], params.lse_full[row]);
    return {};
}

}  // namespace condensate::cpu
