// What block selection knows of a tile, and a worker's memory for it.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/unit_scores.h"

namespace condensate::cpu {

// A tile or scan tile, and what its list may name.
struct SelectTile : Tile {
    SelectTile(const BlockSelectParams& params, int64_t head, int64_t index, int positions)
        : Tile(params.problem, head, index, positions),
          blocks(reachable_blocks(ranges(params.problem), span())),
          whole(params.whole_blocks(positions)) {}

    int64_t blocks;     // that hold a key some of the queries may see
    WholeBlocks whole;  // that no list needs
};

// The rows that are scored, and what their masses are relative to.
struct ScoredRows {
    ScoredRows(Arena& arena, int64_t dim)
        : rows(arena, dim),
          state(arena.take<SoftmaxState>(1)),
          norm_max(arena.take<float>(kMaxRows)),
          norm_inverse(arena.take<float>(kMaxRows)) {}

    QueryRows rows;
    SoftmaxState* state;  // of the units summed last
    float* norm_max;
    float* norm_inverse;  // 0 for a row that has no masses

    int64_t padded() const { return rows.panel_count() * kPanelRows; }

    void start_sum() {
        std::fill(state->max, state->max + kMaxRows, -INFINITY);
        std::fill(state->sum, state->sum + kMaxRows, 0.0f);
        std::fill(state->sum_error, state->sum_error + kMaxRows, 0.0f);
    }
    // Masses are relative to `times` the sum.
    void take_norm(int times) {
        for (int row = 0; row < kMaxRows; ++row) {
            const float sum = state->sum[row];
            const bool usable = sum > 0;  // it sees a unit, and no NaN or +inf, which make it NaN
            norm_max[row] = usable ? state->max[row] : 0.0f;
            norm_inverse[row] = usable ? 1.0f / (static_cast<float>(times) * sum) : 0.0f;
        }
    }
};

struct SelectScratch {
    SelectScratch(Arena& arena, const BlockSelectParams& params)
        : dim(summary_dim(params.selector, static_cast<int>(params.problem.head_dim))),
          pools(arena, dim),
          queries(arena, dim),
          units(arena, dim) {
        const int64_t blocks = num_blocks(params.problem.kv_len);
        // The last 64 units may reach past the last block.
        const int64_t padded = blocks + kTileKeys;
        block_max = arena.take<float>(padded * kMaxRows);
        block_sum = arena.take<float>(padded * kMaxRows);
        tile_mass = arena.take<float>(blocks);
        visited = arena.take<int32_t>(blocks);
        order = arena.take<int32_t>(blocks);
        shortlist = arena.take<int32_t>(blocks);
        mass = arena.take<float>(kMaxRows);
        key_max = arena.take<float>(kMaxRows);
        key_sum = arena.take<float>(kMaxRows);
        ones = arena.take<float>(kMaxRows);
        base = arena.take<float>(kMaxRows);
        rest = arena.take<double>(kMaxRows);
        sums = arena.take<double>(kMaxRows);
    }

    int64_t dim;
    ScoredRows pools;  // positions are the pools' last ones
    ScoredRows queries;
    UnitScores units;
    float* block_max;    // [n-th scored block][padded rows]
    float* block_sum;    // [n-th scored block][padded rows]
    float* tile_mass;    // [block]
    int32_t* visited;    // blocks whose units are scored
    int32_t* order;      // candidates for the list
    int32_t* shortlist;  // of the scan tile
    float* mass;         // [row]
    float* key_max;      // [row] of one block's keys
    float* key_sum;      // [row] of one block's keys
    float* ones;         // [row]
    float* base;         // [row] what exponentials are relative to
    double* rest;        // [pool] log of the sum over units that only the scan saw
    double* sums;        // [row]
};

}  // namespace condensate::cpu
