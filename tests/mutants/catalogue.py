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
TIES = "test_block_selection.py ties_go and 100-150"
SCANS = "test_block_selection.py exact_scores or hottest"
SHORTLISTS = "test_block_selection.py exact_scores or keys_rank or refined_by_its_keys"
TOP_P = "test_block_selection.py top_p or whole_mass"
BUDGETS = "test_block_selection.py has_its_own_budget"
SHARED_SCANS = "test_block_selection.py shared_scan or share_a_scan"
WHOLE = "test_block_selection.py attended_as_a_whole"
KEYS = "test_block_selection.py single_query"
TOKENS = "test_token_selection.py integer_scores"
MERGING = "test_states.py merge"
FAR = "test_far_field.py group_sizes or window_and_anchor"
FAR_POOLS = "test_far_field.py pool_borders and 0-130"
FAR_REFERENCE = "test_far_field.py edges_on_every_path and 64-2-1"
# On CUDA by the number of the path: 0 is sm80, 1 simt, 2 sm90.
FAR_SM80 = "test_far_field.py pool_borders and 0-130-0"
FAR_SIMT = "test_far_field.py pool_borders and 0-130-1"
FAR_SM90 = "test_far_field.py pool_borders and 0-130-2"
FAR_LATER = "test_far_field.py earlier_rows"
GAP = "test_far_estimate.py raised_by_the_gap"
GAP_SAMPLES = "test_far_estimate.py the_sampled_blocks"
GAP_LIGHT = "test_far_estimate.py weighs_nothing"
GAP_PARTIAL = "test_far_estimate.py without_a_window"
GAP_SHARE = "test_far_estimate.py defined_one"
GAP_CALLS = "test_far_estimate.py of_a_single_query"
DECODE_SUMMARIES = "test_decode_summaries.py centers or (step_by_step and 5-64)"
DECODE_TOUCHED = "test_decode_summaries.py what_the_appended"
DECODE_LISTS = "test_decode_selection.py tied_integers or ties_go"
DECODE_TOP_P = "test_decode_selection.py top_p"
DECODE_EDGES = "test_decode_attention.py windows_and_anchors"
DECODE_LAYOUTS = "test_decode_attention.py layouts and (128 or None)"
DECODE_DENSE = "test_decode_attention.py covers_the_cache or query_lengths"
DECODE_OPTIONS = "test_decode_attention.py options or 8_bit"
DECODE_WEIGHTS = "test_decode_attention.py queries_of_zero"
DECODE_MARKERS = "test_decode_attention.py weighs_the_same"
DECODE_GIVEN = "test_decode_contents.py token_list"
DECODE_CHUNKS = "test_decode_attention.py long_and_dense"
DECODE_HOSTILE_DENSE = "test_decode_contents.py dense_call"
DECODE_HOSTILE = "test_decode_contents.py not_there or token_list or out_of_bounds"
DECODE_ALONE = "test_decode_contents.py what_it_is_alone or its_batch"

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
        "if ((cover == BlockCover::kNone && !has_threshold()) || block == 2) return;",
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
        "ops_.score(s_.rows.panels, s_.keys, dim, dim, panels, p_.scale, s_.scores);\n        if",
        "ops_.score(s_.rows.panels, s_.keys, dim, dim, panels, p_.scale * 1.001f, s_.scores);\n"
        "        if",
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
        "sum[d] / static_cast<float>(scan_pool())",
        "test_block_selection.py longer_contexts",
    ),
    Mutant(
        "tile_mass_of_the_last_rows",
        "cpu/tile_ops.inl",
        "best = vmax(best, m);",
        "best = m;",
        "test_block_selection.py exact_scores_give_the_defined_lists",
    ),
    Mutant(
        "unit_visible_before_its_last_key",
        "cpu/unit_scores.h",
        ": (position + 1) / keys;",
        ": position / keys + 1;",
        SCANS,
    ),
    Mutant(
        "shortlist_of_the_lowest_blocks",
        "cpu/block_select.cc",
        "shortlisted_ = take_largest(eligible, width);",
        "shortlisted_ = min_i64(eligible, width);",
        SHORTLISTS,
    ),
    Mutant(
        "shortlist_of_half_the_width",
        "cpu/block_select.cc",
        "const int64_t width = shortlist_width(params_.refinement(), params_.max_blocks);",
        "const int64_t width = shortlist_width(params_.refinement(), params_.max_blocks) / 2;",
        SHORTLISTS,
    ),
    Mutant(
        "shortlist_not_cut_to_the_tile",
        "cpu/block_select.cc",
        "if (is_eligible(p_.ranges(), tile_.span, s_.shortlist[n], tile_.whole))",
        "",
        SHARED_SCANS,
    ),
    Mutant(
        "scan_without_a_norm",
        "cpu/block_select.cc",
        "score_blocks(pools, levels.norm, all, Keep::kSum);",
        "score_blocks(pools, levels.norm, {s_.visited, 1}, Keep::kSum);",
        SCANS,
    ),
    Mutant(
        "scan_by_whole_blocks",
        "cpu/block_select.cc",
        "block_mass(pools, s_.block_max + block * pools.padded(), s_.ones, s_.mass);",
        "block_mass(pools, block, s_.mass);",
        SCANS,
    ),
    Mutant(
        "shared_scan_by_queries_of_a_tile",
        "include/condensate/geometry.h",
        "return scan_tiles(selector, kv_len) * pool_size(group);",
        "return (selector, kv_len, pool_size(group));",
        SHARED_SCANS,
    ),
    Mutant(
        "single_query_listed_by_its_scan",
        "cpu/block_select.cc",
        "params_.refinement() != Refinement::kNone;",
        "params_.refinement() == Refinement::kUnits;",
        SHORTLISTS,
    ),
    Mutant(
        "shared_scan_makes_the_lists",
        "cpu/block_select.cc",
        "params_.refinement() != Refinement::kNone;",
        "params_.refinement() == Refinement::kKeys;",
        SHARED_SCANS,
    ),
    Mutant(
        "single_query_refined_by_units",
        "cpu/block_select.cc",
        "if (params_.refinement() == Refinement::kKeys) {",
        "if (p_.query_len < 1) {",
        SHORTLISTS,
    ),
    Mutant(
        "keys_of_the_first_head",
        "cpu/unit_scores.h",
        "head / p.kv_heads, head % p.kv_heads,",
        "head / p.kv_heads, 0 * head,",
        SHORTLISTS,
    ),
    Mutant(
        "a_key_weighs_as_much_as_a_unit",
        "cpu/block_select.cc",
        "queries.take_norm(kShortUnits.keys);",
        "queries.take_norm(kShortUnits.keys / 8);",
        TOP_P,
    ),
    Mutant(
        "refinement_without_windows",
        "cpu/block_select.cc",
        "window_blocks(p_.ranges(), tile_.span));\n        uint32_t",
        "BlockRange{0, 0});\n        uint32_t",
        SHORTLISTS,
    ),
    Mutant(
        "top_p_leaves_out_a_block_too_many",
        "cpu/block_select.cc",
        "            if (dropped > spare) break;\n            --count;",
        "            --count;\n            if (dropped > spare) break;",
        TOP_P,
    ),
    Mutant(
        "top_p_cuts_the_last_blocks",
        "cpu/block_select.cc",
        "std::sort(s_.order, s_.order + count, heavier());",
        "",
        TOP_P,
    ),
    Mutant(
        "budget_of_the_first_head",
        "include/condensate/params.h",
        "budget_blocks(head_keys[kv_head], max_blocks)",
        "budget_blocks(head_keys[0 * kv_head], max_blocks)",
        BUDGETS,
    ),
    Mutant(
        "negative_budget",
        "include/condensate/geometry.h",
        "min_i64(max_i64(keys, 0) / kBlockKeys, most)",
        "min_i64(keys / kBlockKeys, most)",
        BUDGETS,
    ),
    Mutant(
        "budget_above_that_of_the_call",
        "include/condensate/geometry.h",
        "min_i64(max_i64(keys, 0) / kBlockKeys, most)",
        "(max_i64(keys, 0) / kBlockKeys + 0 * most)",
        BUDGETS,
    ),
    Mutant(
        "masses_do_not_stop_at_the_largest_float",
        "cpu/tile_ops.inl",
        "m = m > kLargest ? splat(kLargest) : m;",
        "m = m > kLargest ? splat(0.0f) : m;",
        "test_block_selection.py overflow",
    ),
    Mutant(
        "mass_without_a_norm",
        "cpu/block_select.cc",
        "const bool usable = sum > 0;",
        "const bool usable = sum >= 0;",
        "test_block_selection.py without_a_coarse",
    ),
    Mutant(
        "nan_left_out_of_the_norm",
        "cpu/tile_ops.inl",
        "total[n] += weight;",
        "total[n] += weight == weight ? weight : splat(0.0f);",
        "test_block_selection.py not_finite or sees_a_nan",
    ),
    Mutant(
        "estimate_counts_anchors_and_windows",
        "cpu/block_select.cc",
        "return beside.contains(static_cast<int>(block)) ||",
        "return (beside.contains(static_cast<int>(block)) && block < 0) ||",
        SCANS,
    ),
    Mutant(
        "estimate_of_the_coarse_units",
        "cpu/block_select.cc",
        "wants_estimate() ? Keep::kBoth : Keep::kBlocks",
        "!wants_estimate() ? Keep::kBoth : Keep::kBlocks",
        SCANS,
    ),
    Mutant(
        "estimate_without_what_only_the_scan_saw",
        "cpu/block_select.cc",
        "const double rest = s_.rest[pool_of(scan_tile_, scan_pool(), g, i)];",
        "const double rest = s_.rest[pool_of(scan_tile_, scan_pool(), g, i)] - 1e9;",
        SHORTLISTS,
    ),
    Mutant(
        "windows_listed_for_a_far_field",
        "include/condensate/geometry.h",
        "whole == WholeBlocks::kAll && block >= window.begin",
        "whole == WholeBlocks::kAll && block > window.begin",
        WHOLE,
    ),
    Mutant(
        "anchors_listed_for_a_far_field",
        "include/condensate/geometry.h",
        "if (whole != WholeBlocks::kNone && block < anchor_blocks(r, t).end) return false;",
        "if (whole != WholeBlocks::kNone && block + 1 < anchor_blocks(r, t).end) return false;",
        WHOLE,
    ),
    Mutant(
        "units_not_raised_to_their_keys",
        "cpu/block_select.cc",
        "std::isfinite(mean_gap) ? mean_gap : 0.0",
        "0.0 * mean_gap",
        KEYS,
    ),
    Mutant(
        "gap_of_walked_blocks_too",
        "cpu/block_select.cc",
        "                if (!is_left) continue;\n",
        "                if (!is_left && row > 0) continue;\n",
        KEYS,
    ),
    Mutant(
        "coarse_mean_in_a_short_ones_place",
        "include/condensate/geometry.h",
        "constexpr UnitLevel kCoarseUnits = {64, 1, 8};",
        "constexpr UnitLevel kCoarseUnits = {64, 1, 7};",
        "test_block_selection.py summaries",
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
        "walked_block_condensed_too",
        "cpu/far_tile.h",
        "part.walked.end = std::lower_bound(part.walked.begin, walked_.end, part.end);",
        "part.walked.end = part.walked.begin;",
        FAR,
    ),
    Mutant(
        "far_window_of_keys_not_blocks",
        "cpu/attention.cc",
        "visit(step.block, step.listed || has_far_field(), ",
        "visit(step.block, step.listed, ",
        FAR,
    ),
    Mutant(
        "far_end_one_block_early",
        "include/condensate/far_field.h",
        "(t.first + 1) / kBlockKeys;",
        "t.first / kBlockKeys;",
        FAR,
    ),
    Mutant(
        "pool_weighs_one_key",
        "cpu/attention.cc",
        "keys[n] > 0 ? scores[row] + bias : -INFINITY;",
        "keys[n] > 0 ? scores[row] + 0 * bias : -INFINITY;",
        FAR,
    ),
    Mutant(
        "cut_pool_dropped",
        "cpu/far_tile.h",
        "return ceil_div(far_end_, width_);",
        "return far_end_ / width_;",
        FAR_POOLS,
    ),
    Mutant(
        "cut_pool_by_the_sum_of_all_its_blocks",
        "cpu/far_tile.h",
        "        if (!part.whole) {",
        "        if (part.begin < 0) {",
        FAR_POOLS,
    ),
    Mutant(
        "pool_mean_over_walked_keys_too",
        "cpu/far_tile.h",
        "part.keys -= block_keys(p_.kv_len, *block);",
        "part.keys -= 0;",
        FAR_POOLS,
    ),
    Mutant(
        "last_pool_of_whole_blocks",
        "cpu/far_pools.cc",
        "min_i64(end * kBlockKeys, p.kv_len) - begin * kBlockKeys",
        "(end - begin) * kBlockKeys",
        FAR,
    ),
    Mutant(
        "infinite_pool_sum_taken_apart",
        "cpu/far_tile.h",
        "if (!ops_.load_rows(DType::kFloat32, sum, 0, 1, dim, row, dim)) return false;",
        "ops_.load_rows(DType::kFloat32, sum, 0, 1, dim, row, dim);",
        "test_far_field.py minus_infinity",
    ),
    Mutant(
        "reference_condenses_walked_blocks",
        "reference/far_field.cc",
        "if (walked[static_cast<size_t>(block)] == 0) blocks.push_back(block);",
        "if (walked[static_cast<size_t>(block)] <= 1) blocks.push_back(block);",
        FAR_REFERENCE,
    ),
    Mutant(
        "far_field_of_a_short_mean",
        "torch/far_field.cc",
        "level.first_row * p.head_dim",
        "(level.first_row - (level.first_row > 0)) * p.head_dim",
        "test_far_field.py head_dims_and_selectors and block",
    ),
    Mutant(
        "estimate_without_the_gap",
        "cpu/attention.cc",
        "std::exp(std::isfinite(mean) ? -mean : 0.0)",
        "std::exp(0.0 * mean)",
        GAP,
    ),
    Mutant(
        "gap_of_every_listed_block",
        "cpu/block_walk.h",
        "listed && walked_entries_ % gap_stride_ == 0",
        "listed && walked_entries_ % gap_stride_ >= 0",
        GAP_SAMPLES,
    ),
    Mutant(
        "gap_of_blocks_by_their_number",
        "cpu/block_walk.h",
        "listed && walked_entries_ % gap_stride_ == 0",
        "listed && block % gap_stride_ == 0",
        GAP_SAMPLES,
    ),
    Mutant(
        "gap_of_blocks_not_seen_in_full",
        "cpu/attention.cc",
        "        } else if (sampled) {",
        "        }\n        if (sampled) {",
        GAP_PARTIAL,
    ),
    Mutant(
        "gap_of_blocks_that_weigh_nothing",
        "cpu/attention.cc",
        "std::exp(max[row] - largest) >= kGapLeastWeight",
        "std::exp(max[row] - largest) >= 0",
        GAP_LIGHT,
    ),
    Mutant(
        "attended_sum_not_rescaled",
        "cpu/attention.cc",
        "s_.gap->kept[row] *= s_.state->rescale[row];",
        "s_.gap->kept[row] *= 1.0f;",
        GAP_SHARE,
    ),
    Mutant(
        "attended_sum_with_the_pools",
        "cpu/attention.cc",
        "pools = s_.state->sum[row] - kept;",
        "pools = s_.state->sum[row];",
        GAP_SHARE,
    ),
    Mutant(
        "single_query_estimated_by_its_attention",
        "torch/attention.cc",
        "call.far_field && p.query_len > 1",
        "call.far_field && p.query_len > 0",
        GAP_CALLS,
    ),
    Mutant(
        "estimate_of_the_far_field_by_the_selection",
        "torch/attention.cc",
        "call.far_field && p.query_len > 1",
        "call.far_field && p.query_len > 2",
        GAP_CALLS,
    ),
    Mutant(
        "reference_gap_of_every_listed_block",
        "reference/attention.cc",
        "entry++ % gap_stride(count) == 0",
        "entry++ % gap_stride(count) >= 0",
        GAP_SAMPLES,
    ),
    Mutant(
        "reference_estimate_without_the_gap",
        "reference/attention.cc",
        "std::exp(kept - pools - jensen_gap(terms, max, blocks.sampled))",
        "std::exp(kept - pools - 0 * jensen_gap(terms, max, blocks.sampled))",
        GAP,
    ),
    Mutant(
        "merge_without_the_sum",
        "cpu/merge_states.cc",
        "max + std::log(sum)}",
        "max + 0 * std::log(sum)}",
        MERGING,
    ),
    Mutant(
        "audit_of_another_row",
        "cpu/omitted_mass.cc",
        "p.query_len + s.rows.query[row]], lse_full)",
        "p.query_len + s.slot[row]], lse_full)",
        "test_states.py omitted_mass_against",
    ),
    Mutant(
        "decode_unfinished_unit_averaged_over_eight",
        "cpu/kv_summaries.cc",
        "finish_key_mean(end - begin);",
        "finish_key_mean(kUnitKeys);",
        DECODE_SUMMARIES,
    ),
    Mutant(
        "decode_summary_rounded_down",
        "cpu/kv_summaries.cc",
        "(row[d] * levels + kShift) - kShift",
        "std::floor(row[d] * levels)",
        DECODE_SUMMARIES,
    ),
    Mutant(
        "decode_center_not_taken_off",
        "cpu/kv_summaries.cc",
        "scratch_.mean[d] -= p_.summaries.key_center[kv_ * dim_ + d]",
        "scratch_.mean[d] -= 0",
        DECODE_SUMMARIES,
    ),
    Mutant(
        "decode_whole_pool_written",
        "cpu/kv_summaries.cc",
        "            if (first_key + end <= appended_begin) continue;\n",
        "",
        DECODE_TOUCHED,
    ),
    Mutant(
        "decode_scan_without_the_queries_scale",
        "cpu/decode_scan.cc",
        "(s.scale[r] * scales[n])",
        "(1.0f * scales[n])",
        DECODE_OPTIONS,
    ),
    Mutant(
        "decode_scan_without_the_center",
        "cpu/decode_scan.cc",
        "p.scale * (product + s.center[r])",
        "p.scale * product",
        DECODE_OPTIONS,
    ),
    Mutant(
        "decode_ties_to_the_higher",
        "cpu/decode_select.cc",
        "ties-- <= 0",
        "order[j] == 0",
        DECODE_LISTS,
    ),
    Mutant(
        "decode_shortlist_one_unit_short",
        "cpu/decode_select.cc",
        "there, p_.shortlist / kUnitKeys,",
        "there, p_.shortlist / kUnitKeys - 1,",
        DECODE_LISTS,
    ),
    Mutant(
        "decode_rank_of_the_first_head",
        "cpu/decode_select.cc",
        "if (scores[c] - z > s_.ranks[c]) s_",
        "if (g == 0) s_",
        DECODE_LISTS,
    ),
    Mutant(
        "decode_top_p_of_the_list_alone",
        "cpu/decode_select.cc",
        "if (!s_.listed[c]) rest += ",
        "if (false) rest += ",
        DECODE_TOP_P,
    ),
    Mutant(
        "decode_anchors_twice",
        "cpu/decode_select.cc",
        "if (span_.is_candidate(previous)) s_",
        "if (previous < span_.recent_begin) s_",
        DECODE_GIVEN,
    ),
    Mutant(
        "decode_first_recent_key_dropped",
        "cpu/decode_select.cc",
        "for (int j = span_.recent_begin; j",
        "for (int j = span_.recent_begin + 1; j",
        DECODE_MARKERS,
    ),
    Mutant(
        "decode_anchors_in_the_rest",
        "cpu/decode_select.cc",
        "            const int64_t first = max_i64(u * kUnitKeys, span_.anchors_end);\n",
        "            const int64_t first = u * kUnitKeys;\n",
        DECODE_EDGES,
    ),
    Mutant(
        "decode_shortlisted_units_in_the_rest",
        "cpu/decode_select.cc",
        "if (s_.shortlisted[u] || sequence_",
        "if (false || sequence_",
        DECODE_WEIGHTS,
    ),
    Mutant(
        "decode_pool_value_of_the_first_pool",
        "cpu/decode_select.cc",
        "sequence_.slot_of(key) / call_.pool;",
        "0 / call_.pool;",
        DECODE_LAYOUTS,
    ),
    Mutant(
        "decode_omitted_mass_of_units_alone",
        "cpu/decode_select.cc",
        "s_.rest[n++] = scores[c];",
        "n += 0;",
        DECODE_WEIGHTS,
    ),
    Mutant(
        "decode_dense_sees_the_next_key",
        "cpu/decode_dense.cc",
        "call.span(item.b, i).visible : 0",
        "call.span(item.b, i).visible + 1 : 0",
        DECODE_DENSE,
    ),
    Mutant(
        "decode_chunks_not_rescaled",
        "cpu/decode_dense.cc",
        "values[d] += out[d] * factor;",
        "values[d] += out[d];",
        DECODE_CHUNKS,
    ),
    Mutant(
        "decode_missing_page_attended",
        "cpu/decode_dense.cc",
        "if (!there[n]) std",
        "if (false) std",
        DECODE_HOSTILE_DENSE,
    ),
    Mutant(
        "decode_missing_page_listed",
        "cpu/decode_select.cc",
        "= there[n] ? score : kMinusInfinity;",
        "= score;",
        DECODE_HOSTILE,
    ),
    Mutant(
        "decode_token_beyond_the_query",
        "cpu/decode_select.cc",
        "tokens[n] >= span_.visible) {",
        "false) {",
        DECODE_HOSTILE,
    ),
    Mutant(
        "decode_sink_without_its_head",
        "cpu/decode.cc",
        "p.sinks[call.head(kv, g)]",
        "p.sinks[g]",
        DECODE_OPTIONS,
    ),
    Mutant(
        "decode_value_scale_forgotten",
        "cpu/decode_rows.h",
        "target[n] *= scale;",
        "target[n] *= 1.0f;",
        DECODE_OPTIONS,
    ),
)

CUDA = (
    Mutant(
        "cuda_barrier_removed",
        "kernels/attention/sm80/kernel.h",
        "__syncthreads();  // this step's K and V have landed",
        "__syncwarp();  // this step's K and V have landed",
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
        "cuda_shortlist_not_cut_to_the_tile",
        "kernels/block_select/common/eligible.h",
        "entry < eligible.low_end",
        "entry < eligible.end",
        SHARED_SCANS,
        "cuda",
    ),
    Mutant(
        "cuda_windows_listed_for_a_far_field",
        "kernels/block_select/common/eligible.h",
        "low = min_i64(low, window.begin);",
        "low = min_i64(low, window.begin + 1);",
        WHOLE,
        "cuda",
    ),
    Mutant(
        "cuda_units_not_raised_to_their_keys",
        "kernels/block_select/common/estimate.h",
        "raised = unit_keys + (left_blocks > 0 && fabsf(gap) < INFINITY ? gap : 0.0f);",
        "raised = unit_keys;",
        KEYS,
        "cuda",
    ),
    Mutant(
        "cuda_block_ties_to_the_higher_index",
        "kernels/block_select/common/top_blocks.h",
        "__popc(equal & below) < ties",
        "__popc(equal & ~below) <= ties",
        TIES,
        "cuda",
    ),
    Mutant(
        "cuda_hopper_mask_skipped",
        "kernels/attention/sm90/produce.h",
        "BlockCover::kFull;",
        "block_cover(ranges, span, block.block, true);",
        TILES,
        "cuda",
    ),
    Mutant(
        "cuda_hopper_mask_of_the_next_key",
        "kernels/attention/sm90/consume.h",
        "kept >>= 2 * (lane() & 3);",
        "kept >>= 2 * (lane() & 3) + 1;",
        EDGES,
        "cuda",
    ),
    Mutant(
        "cuda_far_bias_of_the_neighbour",
        "kernels/attention/sm90/consume.h",
        "bias[8 * n + e % 2]",
        "bias[8 * n + 1 - e % 2]",
        FAR_SM90,
        "cuda",
    ),
    Mutant(
        "cuda_far_row_in_the_next_place",
        "kernels/attention/sm90/far_rows.h",
        "made().pool[ordinal] - first_pool(stage);",
        "made().pool[ordinal] - first_pool(stage) + 1;",
        FAR_SM90,
        "cuda",
    ),
    Mutant(
        "cuda_far_keys_and_values_exchanged",
        "kernels/attention/sm90/produce.h",
        "first + j * kBlockKeys, head, which);",
        "first + j * kBlockKeys, head, which ^ 1);",
        FAR_SM90,
        "cuda",
    ),
    Mutant(
        "cuda_far_values_behind_the_pools_kept",
        "kernels/attention/sm90/far_rows.h",
        "if (which(stage) == 1) clear_rows(",
        "if (which(stage) == 2) clear_rows(",
        FAR_LATER,
        "cuda",
    ),
    Mutant(
        "cuda_far_walked_block_not_subtracted",
        "device/far_rows.h",
        "channels.add(mean, walked.block, -count);",
        "channels.add(mean, walked.block, 0);",
        FAR_SM80,
        "cuda",
    ),
    Mutant(
        "cuda_far_cut_pool_taken_whole",
        "device/far_rows.h",
        "return end < min((pool + 1) << log2_pool, blocks);",
        "return end < 0 * pool;",
        FAR_LATER,
        "cuda",
    ),
    Mutant(
        "cuda_far_pool_misses_a_block",
        "kernels/far_pools/common/far_pools.cu",
        "min_i64(end - first, kFarSumBlocks)",
        "min_i64(end - first - 1, kFarSumBlocks)",
        FAR_SM80,
        "cuda",
    ),
    Mutant(
        "cuda_far_pool_counts_as_one_key",
        "kernels/attention/simt/attention.cu",
        "score[r] + logf(static_cast<float>(keys))",
        "score[r] + 0.0f * logf(static_cast<float>(keys))",
        FAR_SIMT,
        "cuda",
    ),
    Mutant(
        "cuda_estimate_without_the_gap",
        "device/jensen_gap.h",
        "kept / pools * exp2f(-log2_gap)",
        "kept / pools * exp2f(0.0f * log2_gap)",
        GAP,
        "cuda",
    ),
    Mutant(
        "cuda_gap_of_every_listed_block",
        "device/block_walk.h",
        "bool sampled = listed && to_sample_ == 0;",
        "bool sampled = listed && to_sample_ >= 0;",
        GAP_SAMPLES,
        "cuda",
    ),
    Mutant(
        "cuda_gap_of_blocks_that_weigh_nothing",
        "device/jensen_gap.h",
        "if (!(weight >= kGapLeastWeight)) continue;",
        "if (!(weight >= 0.0f)) continue;",
        GAP_LIGHT,
        "cuda",
    ),
    Mutant(
        "cuda_gap_of_half_blocks",
        "kernels/attention/sm80/far_step.h",
        "if (Traits::kStepKeys < kBlockKeys) half_block = !half_block;",
        "",
        GAP_SHARE,
        "cuda",
    ),
    Mutant(
        "cuda_pools_sum_not_rescaled",
        "kernels/attention/sm80/far_step.h",
        "pools[m][half] *= factor[m][half];",
        "pools[m][half] *= 1.0f;",
        GAP_SHARE,
        "cuda",
    ),
    Mutant(
        "cuda_hopper_attended_sum_not_rescaled",
        "kernels/attention/sm90/consume.h",
        "kept[half] *= raised ? rescale[0][half] : 1.0f;",
        "kept[half] *= 1.0f;",
        GAP_SHARE,
        "cuda",
    ),
    Mutant(
        "cuda_hopper_gap_with_the_neighbours_scores",
        "kernels/attention/sm90/consume.h",
        "set_scores<kBlockTiles, kBlockTiles>",
        "set_scores<0 * kBlockTiles, kBlockTiles>",
        GAP_SHARE,
        "cuda",
    ),
    Mutant(
        "cuda_hopper_gap_of_blocks_not_seen_in_full",
        "kernels/attention/sm90/produce.h",
        "step.full[j] && block.sampled) step",
        "exists && block.sampled) step",
        GAP_PARTIAL,
        "cuda",
    ),
    Mutant(
        "cuda_simt_attended_sum_not_rescaled",
        "kernels/attention/simt/attention.cu",
        "            kept *= rescale;\n",
        "",
        GAP_SHARE,
        "cuda",
    ),
    Mutant(
        "cuda_simt_gap_without_its_maximum",
        "kernels/attention/simt/attention.cu",
        "gap += (logf(weight) + largest) / 32",
        "gap += logf(weight) / 32",
        GAP_SAMPLES,
        "cuda",
    ),
)

ALL = CPU + CUDA
