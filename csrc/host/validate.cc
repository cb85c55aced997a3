#include "host/validate.h"

#include <cmath>
#include <initializer_list>
#include <string>

#include "host/status.h"

namespace condensate {
namespace {

constexpr int64_t kMaxLength = int64_t{1} << 31;    // lengths, windows and indices fit int32
constexpr int64_t kMaxElements = int64_t{1} << 58;  // of one tensor: offsets in bytes fit int64

using LL = long long;

// Elements of a tensor of these sizes, none negative; at most kMaxElements.
int64_t elements(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (int64_t size : sizes)
        if (size == 0) return 0;
    for (int64_t size : sizes)
        product = product > kMaxElements / size ? kMaxElements : product * size;
    return product;
}

Status invalid_size(const char* op, const char* name, int64_t value) {
    return make_status(StatusCode::kInvalidArgument,
                       "%s: %s is %lld, expected 0 <= %s < 2^31; split the call.", op, name,
                       static_cast<LL>(value), name);
}

bool is_length(int64_t value) { return value >= 0 && value < kMaxLength; }

Status check_dtype(const char* op, DType dtype) {
    if (dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32)
        return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: dtype code is %d, expected float16 (0), bfloat16 (1) or float32 (2); "
                       "convert the tensors first.",
                       op, static_cast<int>(dtype));
}

Status check_head_dim(const char* op, int64_t head_dim) {
    if (head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0) return {};
    if (head_dim > kMaxHeadDim || head_dim < 1)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: head_dim is %lld, expected a multiple of 8 from 8 to %d; use "
                           "heads of at most %d elements.",
                           op, static_cast<LL>(head_dim), kMaxHeadDim, kMaxHeadDim);
    return make_status(StatusCode::kInvalidArgument,
                       "%s: head_dim is %lld, expected a multiple of 8 from 8 to %d; pad the last "
                       "dimension with zeros to %lld and keep the scale of the unpadded size.",
                       op, static_cast<LL>(head_dim), kMaxHeadDim,
                       static_cast<LL>(ceil_div(head_dim, 8) * 8));
}

struct NamedSize {
    const char* name;
    int64_t value;
};

Status check_problem(const char* op, const Problem& p) {
    Status status = check_dtype(op, p.dtype);
    if (!status.ok()) return status;
    if (!is_length(p.batch)) return invalid_size(op, "batch", p.batch);
    if (!is_length(p.query_len)) return invalid_size(op, "query_len", p.query_len);
    if (!is_length(p.kv_len)) return invalid_size(op, "kv_len", p.kv_len);
    status = validate_heads(op, p.query_heads, "key", p.kv_heads);
    if (!status.ok()) return status;
    status = check_head_dim(op, p.head_dim);
    if (!status.ok()) return status;
    const NamedSize ranges[] = {{"window", p.window}, {"anchors", p.anchors}};
    for (const auto& [name, value] : ranges)
        if (!is_length(value))
            return make_status(StatusCode::kInvalidArgument,
                               "%s: %s is %lld, expected 0 <= %s < 2^31; pass 0 for none.", op,
                               name, static_cast<LL>(value), name);
    if (!std::isfinite(p.scale))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: scale is %g, expected a finite number; pass None for "
                           "1/sqrt(head_dim).",
                           op, static_cast<double>(p.scale));
    return {};
}

// Batch, heads, length, element type and row size of a stage that reads keys without queries.
template <class Params>
Status check_keys(const char* op, const Params& p) {
    Status status = check_dtype(op, p.dtype);
    if (!status.ok()) return status;
    if (!is_length(p.batch)) return invalid_size(op, "batch", p.batch);
    if (!is_length(p.kv_heads)) return invalid_size(op, "kv_heads", p.kv_heads);
    if (!is_length(p.kv_len)) return invalid_size(op, "kv_len", p.kv_len);
    return check_head_dim(op, p.head_dim);
}

// `count` is how many elements the pointer stands for; an empty tensor may be null.
Status check_pointer(const char* op, const char* name, const void* data, int64_t count) {
    if (count >= kMaxElements)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: %s has 2^58 elements or more, expected fewer; split the call by "
                           "batch, heads or queries.",
                           op, name);
    if (data != nullptr || count == 0) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: %s is null, expected a pointer to %lld elements; allocate it.", op,
                       name, static_cast<LL>(count));
}

// Both or neither of two pointers that belong together.
Status check_pair(const char* op, const char* first, const void* a, const char* second,
                  const void* b) {
    if ((a == nullptr) == (b == nullptr)) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: only one of %s and %s is given, expected both or neither; pass both "
                       "results of the selection.",
                       op, first, second);
}

Status check_width(const char* op, int64_t max_blocks) {
    if (is_length(max_blocks)) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: max_blocks is %lld, expected 0 <= max_blocks < 2^31; pass topk / %d.",
                       op, static_cast<LL>(max_blocks), kBlockKeys);
}

// Elements of the tensors of a checked problem.
struct Counts {
    explicit Counts(const Problem& p)
        : rows(elements({p.batch, p.query_heads, p.query_len})),
          query(elements({rows, p.head_dim})),
          key(elements({p.batch, p.kv_heads, p.kv_len, p.head_dim})),
          tiles(elements({p.batch, p.kv_heads, num_tiles(p.query_len, p.group())})) {}
    int64_t rows, query, key, tiles;
};

struct NamedPointer {
    const char* name;
    const void* data;
    int64_t count;
};

template <int kCount>
Status check_pointers(const char* op, const NamedPointer (&pointers)[kCount]) {
    for (const NamedPointer& p : pointers) {
        Status status = check_pointer(op, p.name, p.data, p.count);
        if (!status.ok()) return status;
    }
    return {};
}

// Means of `blocks` blocks, over all heads; `names` are those of the pointer and of the stride.
struct MeansNames {
    const char* data;
    const char* stride;
};
Status check_means(const char* op, MeansNames names, const BlockMeans& means, int64_t blocks,
                   int64_t head_dim) {
    if (blocks > 0 && means.stride_block < head_dim)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: %s is %lld, expected at least head_dim (%lld), as rows of means do "
                           "not overlap; pass the elements from one block's row to the next.",
                           op, names.stride, static_cast<LL>(means.stride_block),
                           static_cast<LL>(head_dim));
    return check_pointer(op, names.data, means.data, elements({blocks, head_dim}));
}

// What attention reads of the far field: means of keys and values, and pools of both.
Status check_far_field(const char* op, const AttentionParams& p) {
    if (p.threshold != nullptr)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: both far_field and threshold are given, expected at most one, as "
                           "the far field condenses blocks and thresholds select keys; leave "
                           "far_field empty.",
                           op);
    const int64_t heads = elements({p.problem.batch, p.problem.kv_heads});
    const int64_t dim = p.problem.head_dim;
    const int64_t blocks = elements({heads, num_blocks(p.problem.kv_len)});
    const int64_t summed = elements({2, heads, num_far_sums(p.problem.kv_len), dim});
    const int64_t pooled = elements({2, heads, num_far_pools(p.problem.kv_len), dim});
    const FarField& far = p.far_field;
    Status status =
        check_means(op, {"far_field.key", "far_field.key.stride_block"}, far.key, blocks, dim);
    if (!status.ok()) return status;
    status = check_means(op, {"far_field.value", "far_field.value.stride_block"}, far.value, blocks,
                         dim);
    if (!status.ok()) return status;
    return check_pointers(
        op, {{"far_field.sums", far.sums, summed}, {"far_field.means", far.means, pooled}});
}

}  // namespace

Status validate_heads(const char* op, int64_t query_heads, const char* kv_name, int64_t kv_heads) {
    if (kv_heads > 0 && query_heads > 0 && query_heads < kMaxLength &&
        query_heads % kv_heads == 0 && query_heads / kv_heads <= kMaxGroup)
        return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: query has %lld heads and %s has %lld, expected a multiple of the "
                       "latter, 1 to %d times as many, fewer than 2^31; check that the tensors are "
                       "[batch, heads, seq, head_dim].",
                       op, static_cast<LL>(query_heads), kv_name, static_cast<LL>(kv_heads),
                       kMaxGroup);
}

std::string block_selector_names() {
    std::string names;
    for (Selector selector : kSelectors) {
        if (!is_block_selector(selector)) continue;
        const std::string name = std::string("\"") + selector_traits(selector).name + "\"";
        const size_t last = names.rfind(" or ");
        if (last != std::string::npos) names.replace(last, 4, ", ");
        names += (names.empty() ? "" : " or ") + name;
    }
    return names;
}

Status validate_block_selector(const char* op, Selector selector) {
    if (is_block_selector(selector)) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: selector is %s, expected %s; \"exact\" selects single keys: pass "
                       "selector=\"exact\" to attention.",
                       op, selector == Selector::kExact ? "\"exact\"" : "unknown",
                       block_selector_names().c_str());
}

Status validate_ranking_scale(const char* op, float scale, Selector selector) {
    if (selector == Selector::kExact || scale > 0 || !std::isfinite(scale)) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: scale is %g, expected scale > 0 because blocks are ranked by "
                       "exp(scale * score); negate the query instead.",
                       op, static_cast<double>(scale));
}

Status validate_topk(const char* op, int64_t topk, Selector selector) {
    if (!is_length(topk))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: topk is %lld, expected 0 <= topk < 2^31; pass 0 to select nothing.",
                           op, static_cast<LL>(topk));
    if (selector == Selector::kExact || topk % kBlockKeys == 0) return {};
    const int64_t lower = topk / kBlockKeys * kBlockKeys;
    return make_status(StatusCode::kInvalidArgument,
                       "%s: topk is %lld, expected a multiple of %d for the block selectors; pass "
                       "%lld or %lld, or selector=\"exact\", which takes any number of keys.",
                       op, static_cast<LL>(topk), kBlockKeys, static_cast<LL>(lower),
                       static_cast<LL>(lower + kBlockKeys));
}

Status validate_top_p(const char* op, double top_p, const char* none) {
    if (top_p > 0 && top_p <= 1) return {};  // not NaN
    return make_status(StatusCode::kInvalidArgument,
                       "%s: top_p is %g, expected 0 < top_p <= 1, the share of the softmax mass "
                       "that lists must hold; pass %s for lists of topk keys.",
                       op, top_p, none);
}

Status validate(const BlockSummaryParams& p) {
    const char* op = "block_summaries";
    Status status = check_keys(op, p);
    if (!status.ok()) return status;
    status = validate_block_selector(op, p.selector);
    if (!status.ok()) return status;
    const int64_t heads = elements({p.batch, p.kv_heads});
    const int dim = summary_dim(p.selector, static_cast<int>(p.head_dim));
    return check_pointers(op, {{"key", p.key.data, elements({heads, p.kv_len, p.head_dim})},
                               {"summaries", p.summaries,
                                elements({heads, summary_rows(p.selector, p.kv_len), dim})}});
}

Status validate(const BlockSelectParams& p) {
    const char* op = "select_blocks";
    Status status = check_problem(op, p.problem);
    if (!status.ok()) return status;
    status = validate_block_selector(op, p.selector);
    if (!status.ok()) return status;
    status = validate_ranking_scale(op, p.problem.scale, p.selector);
    if (!status.ok()) return status;
    status = check_width(op, p.max_blocks);
    if (!status.ok()) return status;
    if (p.top_p != 0) status = validate_top_p(op, p.top_p, "0");
    if (!status.ok()) return status;
    Counts n(p.problem);
    const int dim = summary_dim(p.selector, static_cast<int>(p.problem.head_dim));
    const int64_t summarised = elements(
        {p.problem.batch, p.problem.kv_heads, summary_rows(p.selector, p.problem.kv_len), dim});
    return check_pointers(op,
                          {{"query", p.query.data, n.query},
                           {"summaries", p.summaries, n.rows == 0 ? 0 : summarised},
                           {"block_indices", p.block_indices, elements({n.tiles, p.max_blocks})},
                           {"block_counts", p.block_counts, n.tiles}});
}

Status validate(const TokenSelectParams& p) {
    const char* op = "select_tokens";
    Status status = check_problem(op, p.problem);
    if (!status.ok()) return status;
    status = validate_topk(op, p.topk, Selector::kExact);
    if (!status.ok()) return status;
    Counts n(p.problem);
    return check_pointers(op, {{"query", p.query.data, n.query},
                               {"key", p.key.data, n.rows == 0 ? 0 : n.key},
                               {"threshold", p.threshold, n.rows},
                               {"tie_index", p.tie_index, n.rows}});
}

Status validate(const FarPoolsParams& p) {
    const char* op = "far_pools";
    Status status = check_keys(op, p);
    if (!status.ok()) return status;
    const int64_t heads = elements({p.batch, p.kv_heads});
    const int64_t blocks = elements({heads, num_blocks(p.kv_len)});
    status = check_means(op, {"key", "key.stride_block"}, p.key, blocks, p.head_dim);
    if (!status.ok()) return status;
    status = check_means(op, {"value", "value.stride_block"}, p.value, blocks, p.head_dim);
    if (!status.ok()) return status;
    const int64_t summed = elements({2, heads, num_far_sums(p.kv_len), p.head_dim});
    const int64_t pooled = elements({2, heads, num_far_pools(p.kv_len), p.head_dim});
    return check_pointers(op, {{"sums", p.sums, summed}, {"means", p.means, pooled}});
}

Status validate(const AttentionParams& p) {
    const char* op = "attention";
    Status status = check_problem(op, p.problem);
    if (!status.ok()) return status;
    status = check_width(op, p.max_blocks);
    if (!status.ok()) return status;
    Counts n(p.problem);
    const int64_t entries = elements({n.tiles, p.max_blocks});
    bool given = p.max_blocks > 0;
    // A list of width 0 has no entries, hence a null index pointer, yet may come with its counts.
    if (given) {
        status = check_pair(op, "block_indices", entries ? p.block_indices : nullptr,
                            "block_counts", entries ? p.block_counts : nullptr);
        if (!status.ok()) return status;
    }
    status = check_pair(op, "threshold", p.threshold, "tie_index", p.tie_index);
    if (!status.ok()) return status;
    if (given && p.block_indices != nullptr && p.threshold != nullptr)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: both block_indices and threshold are given, expected at most one "
                           "selection; drop one of them.",
                           op);
    if (p.far_field.key.given()) {
        status = check_far_field(op, p);
        if (!status.ok()) return status;
    } else if (p.omitted_mass_estimate != nullptr && n.key > 0) {
        return make_status(
            StatusCode::kInvalidArgument,
            "%s: omitted_mass_estimate is given without far_field, expected both, as "
            "the estimate is made of the far field's pools; fill in far_field, or "
            "have the selection estimate.",
            op);
    }
    int64_t keys = n.rows == 0 ? 0 : n.key;
    return check_pointers(op,
                          {{"query", p.query.data, n.query},
                           {"key", p.key.data, keys},
                           {"value", p.value.data, keys},
                           {"block_indices", p.block_indices, p.threshold != nullptr ? 0 : entries},
                           {"out", p.out, n.query}});
}

Status validate(const OmittedMassParams& p) {
    const char* op = "omitted_mass";
    Status status = check_problem(op, p.problem);
    if (!status.ok()) return status;
    if (!is_length(p.num_rows)) return invalid_size(op, "num_rows", p.num_rows);
    if (p.rows == nullptr && p.num_rows != 0 && p.num_rows != p.problem.query_len)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: num_rows is %lld without rows, expected query_len (%lld); pass the "
                           "query indices to audit as rows.",
                           op, static_cast<LL>(p.num_rows), static_cast<LL>(p.problem.query_len));
    Counts n(p.problem);
    const int64_t audited = elements({p.problem.batch, p.problem.query_heads, p.num_rows});
    bool empty = audited == 0;
    return check_pointers(op, {{"query", p.query.data, empty ? 0 : n.query},
                               {"key", p.key.data, empty ? 0 : n.key},
                               {"lse", p.lse, empty ? 0 : n.rows},
                               {"omitted", p.omitted, audited}});
}

Status validate(const OmittedFromLseParams& p) {
    const char* op = "omitted_from_lse";
    if (p.rows < 0)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: rows is %lld, expected rows >= 0; pass batch * heads * query_len.",
                           op, static_cast<LL>(p.rows));
    return check_pointers(
        op,
        {{"lse", p.lse, p.rows}, {"lse_full", p.lse_full, p.rows}, {"omitted", p.omitted, p.rows}});
}

Status validate(const MergeStatesParams& p) {
    const char* op = "merge_states";
    Status status = check_dtype(op, p.dtype);
    if (!status.ok()) return status;
    if (p.rows < 0)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: rows is %lld, expected rows >= 0; pass batch * heads * query_len.",
                           op, static_cast<LL>(p.rows));
    status = check_head_dim(op, p.head_dim);
    if (!status.ok()) return status;
    const int64_t numbers = elements({p.rows, p.head_dim});
    return check_pointers(op, {{"out_a", p.out_a, numbers},
                               {"lse_a", p.lse_a, p.rows},
                               {"out_b", p.out_b, numbers},
                               {"lse_b", p.lse_b, p.rows},
                               {"out", p.out, numbers},
                               {"lse", p.lse, p.rows}});
}

}  // namespace condensate
