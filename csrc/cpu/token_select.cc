// The topk-th largest score per query and head, in O(kv_len) memory per thread: 32 rows are scored
// against all their keys at a time, then a radix search per row finds the threshold.
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/query_rows.h"

namespace condensate::cpu {
namespace {

constexpr int kChunkRows = 32;  // rows whose scores are kept at a time
constexpr int kRadixBits = 11;  // of 32, 11 and then 10 more
constexpr int kBins = 1 << kRadixBits;

struct Scratch {
    Scratch(Arena& arena, const Problem& p)
        : rows(arena, p.head_dim),
          keys(arena.take<float>(kTileKeys * p.head_dim)),
          tile(arena.take<float>(kTileKeys * kScoreStride)),
          score_ld(num_blocks(p.kv_len) * kBlockKeys),
          scores(arena.take<float>(kChunkRows * score_ld)),
          ordered(arena.take<uint32_t>(score_ld)),
          index(arena.take<int32_t>(score_ld)),
          bins(arena.take<int32_t>(kBins)) {}

    QueryRows rows;
    float* keys;
    float* tile;
    int64_t score_ld;
    float* scores;      // [row][score_ld]
    uint32_t* ordered;  // of one row's candidates
    int32_t* index;     // their places among the candidates, ascending
    int32_t* bins;
};

struct Threshold {
    float score;
    int32_t tie_index;
};

float score_of_order_key(uint32_t key) {
    return float_from_bits(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

// Narrows `count` candidates to those in the bin that holds the rank-th largest of them. Returns
// how many are left; *rank becomes the rank among them. `first` says that index is not filled yet.
int64_t narrow(Scratch& s, int64_t count, int shift, int bits, bool first, int64_t* rank) {
    const uint32_t mask = (1u << bits) - 1;
    std::memset(s.bins, 0, sizeof(int32_t) * kBins);
    for (int64_t n = 0; n < count; ++n) ++s.bins[s.ordered[n] >> shift & mask];
    int64_t bin = mask;
    while (s.bins[bin] < *rank) *rank -= s.bins[bin--];
    int64_t kept = 0;
    for (int64_t n = 0; n < count; ++n) {
        if ((s.ordered[n] >> shift & mask) != static_cast<uint32_t>(bin)) continue;
        s.ordered[kept] = s.ordered[n];
        s.index[kept++] = first ? static_cast<int32_t>(n) : s.index[n];
    }
    return kept;
}

// Candidates are two runs of keys: [begin0, end0) and [begin1, end1), the second after the window.
struct Candidates {
    int64_t begin0, end0, begin1, end1;
    int64_t key(int64_t n) const {
        return n < end0 - begin0 ? begin0 + n : begin1 + n - (end0 - begin0);
    }
};

Candidates candidates_of(const Ranges& r, int64_t position) {
    Candidates c;
    const int64_t visible = r.causal ? min_i64(position + 1, r.kv_len) : r.kv_len;
    c.begin0 = min_i64(r.anchors, r.kv_len);
    c.end0 = max_i64(c.begin0, min_i64(visible, position - r.window + 1));
    c.begin1 = c.end1 = r.kv_len;
    if (!r.causal) c.begin1 = min_i64(r.kv_len, max_i64(c.end0, position + r.window));
    return c;
}

Threshold find_threshold(const TileOps& ops, Scratch& s, const float* scores, const Candidates& c,
                         int64_t topk) {
    const int64_t count0 = c.end0 - c.begin0, count = count0 + c.end1 - c.begin1;
    ops.order_keys(scores + c.begin0, count0, s.ordered);
    ops.order_keys(scores + c.begin1, count - count0, s.ordered + count0);
    int64_t numbers = 0;  // NaN is never selected
    for (int64_t n = 0; n < count; ++n) numbers += s.ordered[n] != 0;
    if (numbers < topk) return {-INFINITY, INT32_MAX};
    if (topk == 0) return {INFINITY, -1};
    int64_t rank = topk;
    int64_t left = narrow(s, count, 21, 11, true, &rank);
    left = narrow(s, left, 10, 11, false, &rank);
    narrow(s, left, 0, 10, false, &rank);
    return {score_of_order_key(s.ordered[0]), static_cast<int32_t>(c.key(s.index[rank - 1]))};
}

// Scores of all rows against keys [0, blocks * 64), row by row.
void score_chunk(const TokenSelectParams& params, const TileOps& ops, const Tile& tile,
                 int64_t blocks, Scratch& s) {
    const Problem& p = params.problem;
    const int dim = static_cast<int>(p.head_dim);
    const KvView keys = view_of(params.key, p, tile.batch, tile.kv_head);
    s.rows.load(ops, p, params.query, tile.batch);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * kBlockKeys;
        load_tile(ops, p, keys, tile.kv_len, begin, dim, s.keys);
        ops.score(s.rows.panels, s.keys, dim, dim, s.rows.panel_count(), p.scale, s.tile);
        for (int row = 0; row < s.rows.count; ++row) {
            float* target = s.scores + row * s.score_ld + begin;
            for (int key = 0; key < kTileKeys; ++key)
                target[key] = s.tile[key * kScoreStride + row];
        }
    }
}

void select_chunk(const TokenSelectParams& params, const TileOps& ops, const Tile& tile,
                  Scratch& s) {
    const Problem& p = params.problem;
    const Ranges ranges = tile.ranges(p);
    const int64_t last = p.causal ? s.rows.last_position() : tile.kv_len - 1;
    score_chunk(params, ops, tile, last < 0 ? 0 : last / kBlockKeys + 1, s);
    for (int row = 0; row < s.rows.count; ++row) {
        const float* scores = s.scores + row * s.score_ld;
        const int64_t position = s.rows.position[row];
        const int64_t at = tile.flat_query(p, s.rows.head[row], s.rows.query[row]);
        Threshold found =
            find_threshold(ops, s, scores, candidates_of(ranges, position), params.topk);
        params.threshold[at] = found.score;
        params.tie_index[at] = found.tie_index;
        if (params.lse_full == nullptr) continue;
        const int64_t visible = p.causal ? max_i64(position + 1, 0) : tile.kv_len;
        params.lse_full[at] = ops.log_sum_exp(scores, visible);
    }
}

}  // namespace

Status select_tokens(const TokenSelectParams& params, const Executor& executor) {
    const Problem& p = params.problem;
    const TileOps& ops = tile_ops();
    const int64_t tiles = num_tiles(p.query_len, p.group());
    return for_each_item(
        executor, p.batch * p.kv_heads * tiles, [&](Arena& arena) { return Scratch(arena, p); },
        [&](int64_t item, Scratch& scratch) {
            const Tile tile(p, item / tiles, item % tiles);
            scratch.rows.clear();
            for (int64_t i = tile.first_query; i < tile.end_query(); ++i)
                for (int64_t h = tile.first_head(); h < tile.end_head(); ++h) {
                    scratch.rows.add(tile, h, i);
                    bool last = i == tile.end_query() - 1 && h == tile.end_head() - 1;
                    if (scratch.rows.count < kChunkRows && !last) continue;
                    select_chunk(params, ops, tile, scratch);
                    scratch.rows.clear();
                }
        });
}

}  // namespace condensate::cpu
