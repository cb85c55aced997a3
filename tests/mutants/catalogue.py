"""The faults: each is one replacement in one source file, and a few tests that must turn red."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # under csrc/
    search: str  # occurs exactly once
    replacement: str
    tests: str  # under tests/, with pytest's -k expression after a space
    device: str = "cpu"


EDGES = "test_attention.py window_and_anchor_edges and lists"
TILES = "test_attention.py tile_and_block_edges"
LENGTHS = "test_attention.py any_lengths"
BAD_LISTS = "test_contents.py bad_list or garbage"
TIES = "test_block_selection.py ties_go"
BLOCKS = "test_attention.py any_lengths and block or strided and block"
TOKENS = "test_token_selection.py integer_scores"
MERGING = "test_states.py merge"

CPU = (
    Mutant(
        "window_one_key_short",
        "cpu/row_mask.h",
        "clamp_to_tile(p - r.window + 1 - begin)",
        "clamp_to_tile(p - r.window + 2 - begin)",
        EDGES,
    ),
    Mutant(
        "anchors_off_by_one",
        "cpu/row_mask.h",
        "clamp_to_tile(r.anchors - begin)",
        "clamp_to_tile(r.anchors + 1 - begin)",
        EDGES,
    ),
    Mutant(
        "one_future_key",
        "cpu/row_mask.h",
        "r.causal ? min_i64(p + 1, r.kv_len)",
        "r.causal ? min_i64(p + 2, r.kv_len)",
        TILES,
    ),
    Mutant(
        "top_left_alignment",
        "include/condensate/geometry.h",
        "return i + kv_len - query_len;",
        "return i + 0 * (kv_len - query_len);",
        TILES,
    ),
    Mutant(
        "count_not_clamped",
        "cpu/block_walk.h",
        "indices + max_i64(0, min_i64(count, width))",
        "indices + max_i64(0, count)",
        BAD_LISTS,
    ),
    Mutant(
        "falling_entries_not_skipped",
        "cpu/block_walk.h",
        "*list_ <= previous_ || *list_ >= blocks_",
        "*list_ < 0 || *list_ >= blocks_",
        BAD_LISTS,
    ),
    Mutant(
        "errors_not_reported",
        "cpu/block_walk.h",
        "*errors_ |= kErrorBlockIndex;",
        "",
        BAD_LISTS,
    ),
    Mutant(
        "block_skipped",
        "cpu/attention.cc",
        "if (cover == BlockCover::kNone && !has_threshold()) return;",
        "if ((cover == BlockCover::kNone && !has_threshold()) || step.block == 2) return;",
        EDGES,
    ),
    Mutant(
        "lse_without_its_maximum",
        "cpu/attention.cc",
        "params_.lse[at] = s_.state->max[row] + std::log(sum);",
        "params_.lse[at] = std::log(sum);",
        TILES,
    ),
    Mutant(
        "scale_off_by_a_thousandth",
        "cpu/attention.cc",
        "panels, p_.scale, s_.scores)",
        "panels, p_.scale * 1.001f, s_.scores)",
        TILES,
    ),
    Mutant(
        "block_ties_to_the_higher_index",
        "cpu/block_select.cc",
        "mass[a] == mass[b] && a < b",
        "mass[a] == mass[b] && a > b",
        TIES,
    ),
    Mutant(
        "pool_mean_over_wrong_count",
        "cpu/block_select.cc",
        "sum[d] / static_cast<float>(end - first)",
        "sum[d] / static_cast<float>(query_pool(p_.group()))",
        BLOCKS,
    ),
    Mutant(
        "tile_mass_of_one_pool",
        "cpu/block_select.cc",
        "*std::max_element(mass, mass + s_.pools.count)",
        "*std::max_element(mass, mass + 1)",
        "test_block_selection.py longer_contexts",
    ),
    Mutant(
        "unit_visible_before_its_last_key",
        "cpu/block_select.cc",
        ": (last + 1) / keys;",
        ": last / keys + 1;",
        "test_equivalence.py nothing_ahead or test_block_selection",
    ),
    Mutant(
        "estimate_counts_what_needs_no_list",
        "cpu/block_select.cc",
        "if (!is_eligible(p_.ranges(), span_, block)) continue;",
        "",
        BLOCKS,
    ),
    Mutant(
        "token_ties_to_one_key",
        "cpu/token_select.cc",
        "c.key(s.index[rank - 1])",
        "c.key(s.index[0])",
        TOKENS,
    ),
    Mutant(
        "second_run_of_candidates_lost",
        "cpu/token_select.cc",
        "if (!r.causal) c.begin1 = ",
        "if (r.causal) c.begin1 = ",
        TOKENS,
    ),
    Mutant(
        "last_unit_divided_by_a_full_count",
        "cpu/block_summary.cc",
        "unit[d] /= static_cast<float>(count);",
        "unit[d] /= static_cast<float>(count > 2 ? (count + 3) / 4 * 4 : count);",
        "test_block_selection.py summaries",
    ),
    Mutant(
        "merge_without_the_sum",
        "cpu/merge_states.cc",
        "max + std::log(sum)}",
        "max}",
        MERGING,
    ),
    Mutant(
        "audit_of_another_row",
        "cpu/omitted_mass.cc",
        "p.query_len + s.rows.query[row]], lse_full)",
        "p.query_len + s.slot[row]], lse_full)",
        "test_states.py omitted_mass_against",
    ),
)

CUDA = (
    Mutant(
        "cuda_barrier_removed",
        "kernels/attention/sm80/kernel.h",
        "__syncthreads();  // this step's K and V have landed",
        "// this step's K and V have landed",
        "test_attention.py every_head_dim or any_lengths or group_size",
        "cuda",
    ),
    Mutant(
        "cuda_copy_not_awaited",
        "kernels/attention/sm80/kernel.h",
        "ptx::cp_async_wait<0>();\n        __syncthreads();",
        "ptx::cp_async_wait<2>();\n        __syncthreads();",
        "test_attention.py every_head_dim or any_lengths or group_size",
        "cuda",
    ),
    Mutant(
        "cuda_window_one_key_short",
        "device/row_mask.h",
        "position - r.window + 1 - key_begin",
        "position - r.window + 2 - key_begin",
        EDGES,
        "cuda",
    ),
    Mutant(
        "cuda_sum_not_rescaled",
        "device/softmax.h",
        "row_sum[m][half] *= rescale[m][half];",
        "",
        TILES,
        "cuda",
    ),
    Mutant(
        "cuda_falling_entries_not_skipped",
        "device/block_walk.h",
        "entry <= last_entry_ || entry >= num_blocks_",
        "entry < 0 || entry >= num_blocks_",
        BAD_LISTS,
        "cuda",
    ),
    Mutant(
        "cuda_block_ties_to_the_higher_index",
        "kernels/block_select/top_blocks.h",
        "__popc(equal & below) < ties",
        "__popc(equal & ~below) <= ties",
        TIES,
        "cuda",
    ),
)

ALL = CPU + CUDA
