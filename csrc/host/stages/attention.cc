// Softmax attention over anchors, window, what was selected, and the far field.
#include "condensate/condensate.h"
#include "condensate/layout.h"
#include "cpu/kernels.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/validate.h"
#include "reference/reference.h"

namespace condensate {
namespace {

using P = AttentionParams;

constexpr int kMaxSm90Group = 16;

bool has_lists(const P& p) { return p.max_blocks > 0 && p.block_indices != nullptr; }

bool aligned(const P& p) {
    const Problem& problem = p.problem;
    const DType dtype = problem.dtype;
    const Extents keys = key_extents(problem);
    const bool tensors = is_aligned16(p.query, dtype, query_extents(problem)) &&
                         is_aligned16(p.key, dtype, keys) && is_aligned16(p.value, dtype, keys) &&
                         is_aligned16(p.out);
    if (!tensors || !p.far_field.key.given()) return tensors;
    const FarField& far = p.far_field;
    const int64_t heads = problem.batch * problem.kv_heads, blocks = num_blocks(problem.kv_len);
    return is_aligned16(far.key, dtype, heads, blocks) &&
           is_aligned16(far.value, dtype, heads, blocks) && is_aligned16(far.sums) &&
           is_aligned16(far.means);
}

const char* sm80_obstacle(const P& p, const DeviceFacts& facts) {
    return mma_obstacle(p.problem.dtype, aligned(p), facts);
}

const char* sm90_obstacle(const P& p, const DeviceFacts& facts) {
    const Problem& problem = p.problem;
    if (const char* obstacle = sm80_obstacle(p, facts)) return obstacle;
    if (const char* obstacle = wgmma_obstacle(facts)) return obstacle;
    if (problem.group() > kMaxSm90Group) return "more than 16 query heads per KV head";
    if (problem.kv_len < 1) return "no keys";
    if (problem.head_dim != 64 && problem.head_dim != 128) return "head_dim is neither 64 nor 128";
    if (problem.query_len < tile_positions(problem.group())) return "fewer queries than a tile";
    const bool boxed = is_boxed(p.query, query_extents(problem)) &&
                       is_boxed(p.key, key_extents(problem)) &&
                       is_boxed(p.value, key_extents(problem));
    return boxed ? nullptr : "a stride that TMA cannot take";
}

// By itself the stage knows of lists only that they are given, and of thresholds not how many keys
// they select.
void describe(const P& p, Plan* plan) {
    const Problem& problem = p.problem;
    plan->tile_positions = tile_positions(problem.group());
    plan->tiles = problem.batch * problem.kv_heads * num_tiles(problem.query_len, problem.group());
    if (p.far_field.key.given()) plan->far_pools = num_far_pools(problem.kv_len);
    if (plan->selection != Selection::kNone) return;
    int64_t selected = 0;
    if (has_lists(p)) {
        plan->selection = Selection::kGiven;
        plan->list_width = p.max_blocks;
        selected = p.max_blocks * kBlockKeys;
    } else if (p.threshold != nullptr) {
        plan->selection = Selection::kTokens;
        selected = problem.kv_len;
    }
    plan->keys_per_query =
        min_i64(problem.kv_len, range_keys(problem, p.far_field.key.given()) + selected);
}

int64_t whole_blocks(int64_t keys) { return ceil_div(keys, kBlockKeys) * kBlockKeys; }

}  // namespace

// With the far field these are whole blocks, those of the tile's windows together, which may begin
// and end inside a block.
int64_t range_keys(const Problem& p, bool far_field) {
    const int64_t window = p.causal ? p.window : max_i64(2 * p.window - 1, 0);
    if (!far_field) return p.anchors + window;
    const int64_t span = window > 0 ? window + tile_positions(p.group()) - 1 : 0;
    const int64_t cut = window > 0 ? kBlockKeys : 0;
    return whole_blocks(p.anchors) + whole_blocks(span) + cut;
}

const StageTable<P>& table_of(const P&) {
    static constexpr StageTable<P> kTable = {
        Stage::kAttention,
        validate,
        [](const P& p) { return p.problem.batch == 0 || p.problem.query_len == 0; },
        [](const P& p) {
            const Problem& problem = p.problem;
            return Work{
                problem.batch * problem.kv_heads * num_tiles(problem.query_len, problem.group()),
                "tiles"};
        },
        describe,
        // Lists of width 0 have counts all the same.
        [](const P& p) { return p.block_counts != nullptr; },
        {{Path::kSm90, kByWgmma, CONDENSATE_SM90_LAUNCHER(attention_sm90), sm90_obstacle,
          [](const P& p) { return p.threshold == nullptr; }},
         {Path::kSm80, kByMma, CONDENSATE_CUDA_LAUNCHER(attention_sm80), sm80_obstacle},
         {Path::kSimt, kByMma, CONDENSATE_CUDA_LAUNCHER(attention_simt)},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) {
              return cpu::attention(p, launch.executor, &launch.errors);
          }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch& launch) {
              reference::attention<double>(p, &launch.errors);
              return Status{};
          }}},
        5};
    return kTable;
}

Status attention(const AttentionParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
