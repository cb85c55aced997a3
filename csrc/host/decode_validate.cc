#include <cmath>
#include <initializer_list>

#include "host/decode.h"
#include "host/status.h"

namespace condensate {
namespace {

using LL = long long;

constexpr int64_t kMaxLength = int64_t{1} << 31;  // lengths and positions fit int32
constexpr int64_t kMaxRows = int64_t{1} << 46;    // times queries and channels: offsets fit int64

struct NamedSize {
    const char* name;
    int64_t value;
};

bool is_head_dim(int64_t head_dim) {
    return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

Status check_sizes(const char* op, std::initializer_list<NamedSize> sizes) {
    for (const auto& [name, value] : sizes)
        if (value < 0 || value >= kMaxLength)
            return make_status(StatusCode::kInvalidArgument,
                               "%s: %s is %lld, expected 0 <= %s < 2^31; pass a length in range.",
                               op, name, static_cast<LL>(value), name);
    return {};
}

Status check_pointers(const char* op, std::initializer_list<const char*> names,
                      std::initializer_list<const void*> pointers) {
    const char* const* name = names.begin();
    for (const void* pointer : pointers) {
        if (pointer == nullptr)
            return make_status(StatusCode::kInvalidArgument,
                               "%s: %s is null, expected a pointer; allocate it.", op, *name);
        ++name;
    }
    return {};
}

Status check_cache(const char* op, const KvCache& cache, int64_t batch) {
    Status status = check_sizes(op, {{"num_pages", cache.num_pages},
                                     {"page_size", cache.page_size},
                                     {"max_pages", cache.max_pages}});
    if (!status.ok()) return status;
    const bool paged = cache.block_table != nullptr;
    const int64_t p = cache.page_size;
    if (paged && (p < 16 || p % 16 != 0 || (p > kPoolKeys && p % kPoolKeys != 0)))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: page_size is %lld, expected 16, 32, 48 or a multiple of 64; "
                           "allocate the cache with such pages.",
                           op, static_cast<LL>(p));
    if (!paged && (cache.num_pages != batch || cache.max_pages != 1))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: key_cache has %lld sequences and batch is %lld, expected one for "
                           "each without a block_table; pass a block_table, or key_cache[:batch].",
                           op, static_cast<LL>(cache.num_pages), static_cast<LL>(batch));
    if (cache.capacity() >= kMaxLength)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: block_table and pages hold %lld tokens a sequence, expected less "
                           "than 2^31; pass fewer columns of block_table.",
                           op, static_cast<LL>(cache.capacity()));
    if (batch == 0) return {};
    status = check_pointers(op, {"cache_seqlens"}, {cache.lengths});
    if (!status.ok() || cache.num_pages == 0 || cache.capacity() == 0) return status;
    return check_pointers(op, {"key_cache", "value_cache"}, {cache.key, cache.value});
}

Status check_head_dim(const char* op, int64_t head_dim) {
    if (is_head_dim(head_dim)) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: head_dim is %lld, expected 64, 96, 128 or 256; pad the last dimension "
                       "with zeros to the next of them and keep the scale of the unpadded size.",
                       op, static_cast<LL>(head_dim));
}

Status check_mode(const char* op, DecodeMode mode) {
    for (DecodeMode known : {DecodeMode::kDense, DecodeMode::kSelectAndAttend, DecodeMode::kSelect,
                             DecodeMode::kGivenTokens})
        if (mode == known) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: mode is %d, expected one of DecodeMode, 0 to 3; pass one of them.", op,
                       static_cast<int>(mode));
}

Status check_cache_dtype(const char* op, DType dtype) {
    for (DType known : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat8E4M3})
        if (dtype == known) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: the caches have dtype code %d, expected float16 (0), bfloat16 (1), "
                       "float32 (2) or float8_e4m3fn (3); convert them.",
                       op, static_cast<int>(dtype));
}

Status check_scale(const char* op, float scale) {
    if (std::isfinite(scale)) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: scale is %g, expected a finite number; pass None for "
                       "1/sqrt(head_dim).",
                       op, static_cast<double>(scale));
}

Status check_softcap(const char* op, float softcap) {
    if (softcap >= 0 && std::isfinite(softcap)) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: softcap is %g, expected a finite number from 0 on; pass 0 for none.",
                       op, static_cast<double>(softcap));
}

Status check_query(const char* op, const DecodeParams& p) {
    if (p.kv_heads < 1 || p.query_heads < 1 || p.query_heads >= kMaxLength ||
        p.query_heads % p.kv_heads != 0 || p.query_heads / p.kv_heads > kMaxGroup)
        return make_status(
            StatusCode::kInvalidArgument,
            "%s: query has %lld heads and key_cache has %lld, expected a multiple "
            "of the cache's heads, 1 to %d times as many, fewer than 2^31; check that "
            "query is [batch, heads, seq, head_dim] and the caches [pages, heads, tokens, "
            "head_dim].",
            op, static_cast<LL>(p.query_heads), static_cast<LL>(p.kv_heads), kMaxGroup);
    if (p.query_len > kMaxDecodeQueries)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: query has %lld positions, expected 1 to %d; split the call, or use "
                           "attention() for prompts.",
                           op, static_cast<LL>(p.query_len), kMaxDecodeQueries);
    const bool known =
        p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat32;
    if (!known || (p.cache.dtype != p.dtype && p.cache.dtype != DType::kFloat8E4M3))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: query has dtype code %d and the caches %d, expected float16 (0), "
                           "bfloat16 (1) or float32 (2) for both, or caches of float8_e4m3fn (3); "
                           "convert query.",
                           op, static_cast<int>(p.dtype), static_cast<int>(p.cache.dtype));
    return {};
}

Status check_budget(const char* op, const DecodeParams& p) {
    Status status = check_sizes(op, {{"window", p.window},
                                     {"anchors", p.anchors},
                                     {"topk", p.topk},
                                     {"shortlist", p.shortlist}});
    if (!status.ok()) return status;
    if (!(p.top_p >= 0 && p.top_p <= 1))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: top_p is %g, expected 0 < top_p <= 1, or None; pass the share of "
                           "the mass that lists must hold.",
                           op, static_cast<double>(p.top_p));
    const bool selects = p.mode == DecodeMode::kSelect || p.mode == DecodeMode::kSelectAndAttend;
    if (selects && (p.shortlist < p.topk || p.shortlist % kUnitKeys != 0))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: shortlist is %lld, expected a multiple of %d that is at least topk "
                           "(%lld); pass %lld or more.",
                           op, static_cast<LL>(p.shortlist), kUnitKeys, static_cast<LL>(p.topk),
                           static_cast<LL>(ceil_div(p.topk, kUnitKeys) * kUnitKeys));
    if (selects && !p.summaries.given() && p.cache.num_pages > 0)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: summaries are not given and window + anchors + shortlist is "
                           "%lld, expected summaries, or a budget that covers the capacity of the "
                           "cache (%lld); pass the summaries that update_kv_summaries keeps.",
                           op, static_cast<LL>(p.window + p.anchors + p.shortlist),
                           static_cast<LL>(p.cache.capacity()));
    return {};
}

Status check_outputs(const char* op, const DecodeParams& p) {
    if (p.batch == 0 || p.query_len == 0) return {};
    if (p.batch * p.query_heads >= kMaxRows)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: query has %lld sequences of %lld heads, expected fewer than 2^46 "
                           "heads in all; split the call.",
                           op, static_cast<LL>(p.batch), static_cast<LL>(p.query_heads));
    Status status = check_pointers(op, {"query"}, {p.query.data});
    if (!status.ok()) return status;
    const bool lists = p.mode == DecodeMode::kGivenTokens || p.mode == DecodeMode::kSelect;
    if (lists && p.topk > 0) {
        status = check_pointers(op, {"token_indices"}, {p.token_indices});
        if (!status.ok()) return status;
    }
    if (lists) status = check_pointers(op, {"token_counts"}, {p.token_counts});
    if (!status.ok() || p.mode == DecodeMode::kSelect) return status;
    return check_pointers(op, {"out"}, {p.out});
}

}  // namespace

Status validate(const DecodeParams& p) {
    const char* op = "attention_with_kvcache";
    Status status = check_mode(op, p.mode);
    if (status.ok()) status = check_sizes(op, {{"batch", p.batch}, {"query_len", p.query_len}});
    if (status.ok()) status = check_query(op, p);
    if (status.ok()) status = check_head_dim(op, p.head_dim);
    if (status.ok()) status = check_cache(op, p.cache, p.batch);
    if (status.ok()) status = check_budget(op, p);
    if (status.ok()) status = check_scale(op, p.scale);
    if (status.ok()) status = check_softcap(op, p.softcap);
    if (status.ok()) status = check_outputs(op, p);
    return status;
}

Status validate(const UpdateSummariesParams& p) {
    const char* op = "update_kv_summaries";
    Status status =
        check_sizes(op, {{"batch", p.batch}, {"kv_heads", p.kv_heads}, {"appended", p.appended}});
    if (status.ok()) status = check_head_dim(op, p.head_dim);
    if (status.ok()) status = check_cache_dtype(op, p.cache.dtype);
    if (status.ok()) status = check_cache(op, p.cache, p.batch);
    const bool empty =
        p.batch == 0 || p.kv_heads == 0 || p.cache.num_pages == 0 || p.cache.page_size == 0;
    if (!status.ok() || empty) return status;
    return check_pointers(op, {"summaries", "summary_scales"},
                          {p.summaries.rows, p.summaries.scales});
}

}  // namespace condensate
