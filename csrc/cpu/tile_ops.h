// The vectorised inner loops of the CPU kernels, as a table of functions: one table per instruction
// set, chosen at run time. All of them work on float32 tiles in scratch memory.
//
// Layouts. Rows (queries) come in panels of kPanelRows; query panels are [panel][dim][kPanelRows].
// A score tile is [kTileKeys][kScoreStride]: scores[key * kScoreStride + row]. Vectors run over
// rows, so a score is one chain of multiply-adds over head_dim whatever else is in the tile: every
// kernel computes bitwise the same score for the same query and key.
#pragma once

#include <cstddef>
#include <cstdint>

#include "condensate/types.h"

namespace condensate::cpu {

constexpr int kTileKeys = 64;   // keys (or summary units) scored at a time
constexpr int kPanelRows = 16;  // rows per panel; panels are padded with zero queries
constexpr int kMaxPanels = 8;   // panels of a tile, at most
constexpr int kMaxRows = kPanelRows * kMaxPanels;
constexpr int kScoreStride = kMaxRows;

// Which of a tile's 64 keys each row attends, as key indices relative to the tile:
// key < visible_end and (key < free_end or window_begin <= key < window_end or selected by score).
struct alignas(64) RowMask {
    int32_t visible_end[kMaxRows];
    int32_t free_end[kMaxRows];  // anchors, or everything in a listed block
    int32_t window_begin[kMaxRows];
    int32_t window_end[kMaxRows];
    float threshold[kMaxRows];  // +inf where nothing is selected by score
    int32_t tie_end[kMaxRows];  // keys below it are selected where score == threshold
};

// Online softmax of every row. The sum carries its rounding error along (Kahan), so that it is as
// good after a million keys as after sixty-four.
struct alignas(64) SoftmaxState {
    float max[kMaxRows];
    float sum[kMaxRows];
    float sum_error[kMaxRows];
    float rescale[kMaxRows];  // what the last tile's new maximum does to earlier contributions
};

struct TileOps {
    const char* name;

    // `rows` rows of `dim` numbers, `stride` apart -> float [rows][ld], dim..ld zero.
    // Returns whether all of them are finite.
    bool (*load_rows)(DType dtype, const void* source, int64_t stride, int rows, int dim,
                      float* target, int ld);

    // The same from 8-bit integers; every number is finite.
    void (*load_int8_rows)(const int8_t* source, int64_t stride, int rows, int dim, float* target,
                           int ld);

    // scores = scale * keys · queries for 64 keys and `panels` panels.
    void (*score)(const float* queries, const float* keys, int ld, int dim, int panels, float scale,
                  float* scores);

    // The same scores for a few queries, [rows][dim] with dim a multiple of kPanelRows: vectors run
    // over head_dim, which saves the empty rows of a panel and adds in another order.
    void (*score_rows)(const float* queries, const float* keys, int ld, int dim, int rows,
                       float scale, float* scores);

    // Sets the scores of keys that a row does not attend to -inf.
    void (*mask)(const RowMask& mask, int panels, float* scores);

    // Replaces scores by exp(score - max) and updates the state.
    void (*softmax)(int panels, float* scores, SoftmaxState* state);

    // out[row] = out[row] * rescale[row] + sum over 64 keys of weights[key][row] * values[key].
    // ld is a multiple of kPanelRows and counts the columns computed.
    void (*accumulate)(const float* weights, const float* values, int ld, int rows,
                       const float* rescale, float* out);

    // Per block of `units` consecutive keys of the tile and per row, over the scores below
    // visible_end: their maximum, NaN apart, and the sum of exp(score - maximum). -inf and 0 if
    // there is no such score, +inf and 1 if one is +inf; the sum is 0 if one is NaN. Blocks are
    // `panels * kPanelRows` apart in the outputs.
    void (*block_sums)(const float* scores, int units, const int32_t* visible_end, int panels,
                       float* block_max, float* block_sum);

    // One block's masses: block_sum * exp(block_max - norm_max) * norm_inverse per row, the largest
    // float where that overflows. Returns the largest; `mass` may be block_sum.
    float (*block_mass)(const float* block_max, const float* block_sum, const float* norm_max,
                        const float* norm_inverse, int panels, float* mass);

    // Natural log of the sum of exp over n contiguous scores; -inf for n = 0.
    float (*log_sum_exp)(const float* scores, int64_t n);

    // Scores as unsigned integers of the same order; NaN becomes 0, below every number.
    void (*order_keys)(const float* scores, int64_t n, uint32_t* keys);
};

// The widest table of this machine, or the one that CONDENSATE_CPU_ISA names; find_tile_ops is null
// where it names none of them.
const TileOps* find_tile_ops();
const TileOps& tile_ops();

// The tables that this build has and this machine can run, widest first; null ends the list.
constexpr int kMaxTileOps = 4;
void list_tile_ops(const TileOps* tables[kMaxTileOps]);

const TileOps* tile_ops_avx512();  // null where not built
const TileOps* tile_ops_avx2();
const TileOps* tile_ops_baseline();

}  // namespace condensate::cpu
