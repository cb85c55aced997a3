// The definition's index arithmetic, once, for host and device: positions, tiles, blocks,
// which key a row attends, which blocks a list may name. docs/definition.md states it in words.
#pragma once

#include <cstdint>

#include "condensate/host_device.h"
#include "condensate/types.h"

namespace condensate {

constexpr int kBlockKeys = 64;  // keys of a selected block
constexpr int kTileRows = 128;  // rows (positions x query heads of one KV head) of a tile, at most
constexpr int kMaxTilePositions = 64;  // positions of a tile, at most
constexpr int kQueryPool = 8;          // consecutive positions whose queries are averaged, at most
constexpr int kMaxScanTiles = 8;       // tiles that share a scan, at most
constexpr int kMaxGroup = 64;          // query heads per KV head, at most
constexpr int kMaxHeadDim = 256;

CONDENSATE_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CONDENSATE_HOST_DEVICE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
CONDENSATE_HOST_DEVICE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

// Positions of one tile for `group` query heads per KV head: the largest power of two with
// positions * group <= kTileRows, and at most kMaxTilePositions.
CONDENSATE_HOST_DEVICE int tile_positions(int group) {
    int positions = kMaxTilePositions;
    while (positions > 1 && positions * group > kTileRows) positions /= 2;
    return positions;
}

// Queries of a bin, which are averaged into one; a tile always holds whole bins.
CONDENSATE_HOST_DEVICE int pool_size(int group) {
    int positions = tile_positions(group);
    return positions < kQueryPool ? positions : kQueryPool;
}

CONDENSATE_HOST_DEVICE int64_t num_tiles(int64_t query_len, int group) {
    return ceil_div(query_len, tile_positions(group));
}
CONDENSATE_HOST_DEVICE int64_t num_blocks(int64_t kv_len) { return ceil_div(kv_len, kBlockKeys); }

// Absolute position of query i: bottom-right alignment. Negative when the query precedes all keys.
CONDENSATE_HOST_DEVICE int64_t query_position(int64_t i, int64_t query_len, int64_t kv_len) {
    return i + kv_len - query_len;
}

// Anchors, window and causality: what a support is made of beside the selected keys.
struct Ranges {
    int64_t kv_len;
    int64_t window;   // keys; 0 = none
    int64_t anchors;  // keys; 0 = none
    bool causal;
};

// May a row at position p attend key j at all?
CONDENSATE_HOST_DEVICE bool is_visible(const Ranges& r, int64_t p, int64_t j) {
    return j >= 0 && j < r.kv_len && (!r.causal || j <= p);
}
CONDENSATE_HOST_DEVICE bool in_window(const Ranges& r, int64_t p, int64_t j) {
    return j > p - r.window && (r.causal ? j <= p : j < p + r.window);
}
// Is key j attended by position p whatever is selected?
CONDENSATE_HOST_DEVICE bool in_ranges(const Ranges& r, int64_t p, int64_t j) {
    return is_visible(r, p, j) && (j < r.anchors || in_window(r, p, j));
}
CONDENSATE_HOST_DEVICE bool in_support(const Ranges& r, int64_t p, int64_t j, bool listed) {
    return is_visible(r, p, j) && (listed || j < r.anchors || in_window(r, p, j));
}

// Positions first..last of the queries of one tile or scan tile (last is its last existing query).
struct TileSpan {
    int64_t first;
    int64_t last;
};
CONDENSATE_HOST_DEVICE TileSpan tile_span(int64_t tile, int positions, int64_t query_len,
                                          int64_t kv_len) {
    int64_t begin = tile * positions;
    int64_t end = min_i64(begin + positions, query_len) - 1;
    return {query_position(begin, query_len, kv_len), query_position(end, query_len, kv_len)};
}

// How a whole block looks to all rows of a tile.
enum class BlockCover : int32_t {
    kNone,     // no row attends any key of it
    kPartial,  // rows or keys differ: evaluate the mask
    kFull,     // every row attends every key
};
CONDENSATE_HOST_DEVICE BlockCover block_cover(const Ranges& r, TileSpan t, int64_t block,
                                              bool listed) {
    int64_t begin = block * kBlockKeys, end = begin + kBlockKeys - 1;  // inclusive
    if (begin >= r.kv_len || (r.causal && begin > t.last)) return BlockCover::kNone;
    bool all_visible = end < r.kv_len && (!r.causal || end <= t.first);
    bool any_window =
        end > t.first - r.window && (r.causal || begin < t.last + r.window) && r.window > 0;
    bool any = listed || begin < r.anchors || any_window;
    if (!any) return BlockCover::kNone;
    bool all_window = begin > t.last - r.window && (r.causal || end < t.first + r.window);
    return all_visible && (listed || end < r.anchors || all_window) ? BlockCover::kFull
                                                                    : BlockCover::kPartial;
}

// Half-open range of blocks.
struct BlockRange {
    int64_t begin;
    int64_t end;
};
// Blocks that hold anchors some row of the tile may attend.
CONDENSATE_HOST_DEVICE BlockRange anchor_blocks(const Ranges& r, TileSpan t) {
    int64_t keys = min_i64(r.anchors, r.kv_len);
    if (r.causal) keys = min_i64(keys, t.last + 1);
    return {0, keys > 0 ? ceil_div(keys, kBlockKeys) : 0};
}
// Blocks that hold keys of some row's window; empty as {x, x}.
CONDENSATE_HOST_DEVICE BlockRange window_blocks(const Ranges& r, TileSpan t) {
    if (r.window <= 0) return {0, 0};
    int64_t begin = max_i64(t.first - r.window + 1, 0);
    int64_t end = min_i64(r.causal ? t.last : t.last + r.window - 1, r.kv_len - 1);  // inclusive
    if (begin > end) return {0, 0};
    return {begin / kBlockKeys, end / kBlockKeys + 1};
}

// Blocks of anchors and windows that the attention attends as a whole, so that no list needs them:
// with the far field all of them. What several tiles share can leave out their anchors' alone.
enum class WholeBlocks : int32_t { kNone, kAnchors, kAll };

// A block is eligible for a tile's list when some query of the tile may attend a key of it that
// is neither an anchor nor in that query's window, and it is not attended as a whole anyway.
CONDENSATE_HOST_DEVICE bool is_eligible(const Ranges& r, TileSpan t, int64_t block,
                                        WholeBlocks whole = WholeBlocks::kNone) {
    int64_t begin = max_i64(block * kBlockKeys, r.anchors);
    int64_t end = min_i64(block * kBlockKeys + kBlockKeys, r.kv_len) - 1;
    if (begin > end) return false;
    if (whole != WholeBlocks::kNone && block < anchor_blocks(r, t).end) return false;
    const BlockRange window = window_blocks(r, t);
    if (whole == WholeBlocks::kAll && block >= window.begin && block < window.end) return false;
    if (r.window <= 0) return !r.causal || begin <= t.last;
    if (begin <= t.last - r.window) return true;
    return !r.causal && end >= t.first + r.window;
}

// Blocks that hold a key some row of the tile sees.
CONDENSATE_HOST_DEVICE int reachable_blocks(const Ranges& r, TileSpan t) {
    int64_t keys = r.causal ? min_i64(t.last + 1, r.kv_len) : r.kv_len;
    return keys > 0 ? static_cast<int>(ceil_div(keys, kBlockKeys)) : 0;
}

// Blocks of anchors and windows, which the attention walks whatever is listed.
struct RangeBlocks {
    int anchors_end, window_begin, window_end;  // [0, anchors_end) and [window_begin, window_end)

    CONDENSATE_HOST_DEVICE RangeBlocks(const Ranges& r, TileSpan t) {
        BlockRange window = window_blocks(r, t);
        anchors_end = static_cast<int>(anchor_blocks(r, t).end);
        window_begin = static_cast<int>(max_i64(window.begin, anchors_end));
        window_end = static_cast<int>(max_i64(window.end, window_begin));
    }
    CONDENSATE_HOST_DEVICE bool contains(int block) const {
        return block < anchors_end || (block >= window_begin && block < window_end);
    }
};

// Is summary unit `unit` visible to an averaged query at position p? Its last key decides.
CONDENSATE_HOST_DEVICE bool is_unit_visible(const Ranges& r, int64_t p, int64_t unit, int keys) {
    int64_t first = unit * keys;
    int64_t last = min_i64(first + keys, r.kv_len) - 1;
    return first < r.kv_len && (!r.causal || last <= p);
}

}  // namespace condensate
