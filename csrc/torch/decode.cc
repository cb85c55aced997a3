#include "torch/decode.h"

#include <string>

#include "condensate/condensate.h"
#include "host/validate.h"
#include "torch/tensor_args.h"
#include "torch/workspace.h"

namespace condensate::ops {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The tensors of a cache, as all these operators take them.
struct CacheTensors {
    const Tensor& key;
    const Tensor& value;
    const Tensor& lengths;
    const MaybeTensor& block_table;
    const MaybeTensor& key_scale;
    const MaybeTensor& value_scale;
};

struct SummaryTensors {
    const MaybeTensor& rows;
    const MaybeTensor& scales;
    const MaybeTensor& key_center;
};

struct ScoreOptions {
    std::optional<double> scale;
    double softcap;
};

// Data of an optional contiguous tensor of these sizes, or null.
template <typename T>
const T* optional_data(const char* op, const char* name, const MaybeTensor& tensor, ScalarType type,
                       const Argument& reference, std::initializer_list<int64_t> sizes) {
    if (!tensor) return nullptr;
    check_contiguous({op, name, *tensor}, type, reference, sizes);
    return static_cast<const T*>(tensor->const_data_ptr());
}

void check_device(const Argument& a, const Argument& reference) {
    // check_same_type_and_device compares dtypes too, which here may differ.
    if (a.tensor.is_cuda() != reference.tensor.is_cuda() ||
        a.tensor.get_device_index() != reference.tensor.get_device_index())
        fail(a.op, std::string(a.name) + " and " + reference.name +
                       " are on different devices, expected one; move one with .to().");
}

KvCache view_cache(const char* op, const CacheTensors& t, int64_t batch) {
    const Argument key{op, "key_cache", t.key}, value{op, "value_cache", t.value};
    const ConstTensor4 k = view4(key), v = view4(value);
    check_value(value, key);
    KvCache cache;
    cache.dtype =
        t.key.scalar_type() == ScalarType::Float8_e4m3fn ? DType::kFloat8E4M3 : element_type(key);
    cache.key = k.data;
    cache.key_stride_page = k.stride_batch;
    cache.key_stride_head = k.stride_head;
    cache.key_stride_token = k.stride_seq;
    cache.value = v.data;
    cache.value_stride_page = v.stride_batch;
    cache.value_stride_head = v.stride_head;
    cache.value_stride_token = v.stride_seq;
    cache.num_pages = t.key.size(0);
    cache.page_size = t.key.size(2);
    const int64_t kv_heads = t.key.size(1);
    check_contiguous({op, "cache_seqlens", t.lengths}, ScalarType::Int, key, {batch});
    cache.lengths = static_cast<const int32_t*>(t.lengths.const_data_ptr());
    if (t.block_table) {
        if (t.block_table->dim() != 2)
            fail(op, "block_table has shape " + shape_string(*t.block_table) +
                         ", expected [batch, max_pages]; reshape it.");
        cache.max_pages = t.block_table->size(1);
        // A table without columns may have no memory, and is still a table.
        static const int32_t kNoPages = 0;
        cache.block_table = optional_data<int32_t>(op, "block_table", t.block_table,
                                                   ScalarType::Int, key, {batch, cache.max_pages});
        if (cache.block_table == nullptr) cache.block_table = &kNoPages;
    }
    cache.key_scale =
        optional_data<float>(op, "key_scale", t.key_scale, ScalarType::Float, key, {kv_heads});
    cache.value_scale =
        optional_data<float>(op, "value_scale", t.value_scale, ScalarType::Float, key, {kv_heads});
    return cache;
}

void check_record(const Argument& a, ScalarType type, const Argument& key,
                  std::initializer_list<int64_t> sizes) {
    const Tensor& t = a.tensor;
    check_device(a, key);
    bool fits = t.scalar_type() == type && t.dim() == static_cast<int64_t>(sizes.size());
    std::string expected;
    for (size_t i = 0; i < sizes.size(); ++i) {
        const int64_t size = sizes.begin()[i];
        expected += (i ? ", " : "") + std::to_string(size);
        fits = fits && t.size(static_cast<int64_t>(i)) == size;
    }
    if (!fits)
        fail(a.op, std::string(a.name) + " has shape " + shape_string(t) + ", expected " +
                       (type == ScalarType::Char ? "int8" : "float32") + " of shape [" + expected +
                       "], a record for each page and head of key_cache; make them with "
                       "KVSummaries.empty_for.");
    int64_t stride = 1;  // of the dimensions within a record, from the last
    for (int64_t d = t.dim() - 1; d >= 2; --d) {
        if (t.size(d) > 1 && t.numel() > 0 && t.stride(d) != stride)
            fail(a.op, std::string(a.name) + " has stride " + std::to_string(t.stride(d)) +
                           " in dimension " + std::to_string(d) + ", expected " +
                           std::to_string(stride) +
                           ": records are contiguous; make them with "
                           "KVSummaries.empty_for.");
        stride *= t.size(d);
    }
}

KvSummaries view_summaries(const char* op, const SummaryTensors& t, const Argument& key,
                           const KvCache& cache) {
    KvSummaries view;
    const int64_t pages = cache.num_pages, heads = key.tensor.size(1), dim = key.tensor.size(3);
    view.key_center =
        optional_data<float>(op, "key_center", t.key_center, ScalarType::Float, key, {heads, dim});
    if (t.rows.has_value() != t.scales.has_value())
        fail(op,
             "only one of summaries and summary_scales is given, expected both or neither; "
             "pass both tensors of a KVSummaries.");
    if (!t.rows || cache.page_size == 0) return view;
    const int64_t rows = record_rows(cache.page_size, cache.block_table != nullptr);
    check_record({op, "summaries", *t.rows}, ScalarType::Char, key, {pages, heads, rows, dim});
    check_record({op, "summary_scales", *t.scales}, ScalarType::Float, key, {pages, heads, rows});
    // Only update_kv_summaries writes to them; its schema says so.
    view.rows = static_cast<int8_t*>(const_cast<void*>(t.rows->const_data_ptr()));
    view.scales = static_cast<float*>(const_cast<void*>(t.scales->const_data_ptr()));
    view.rows_stride_page = t.rows->stride(0);
    view.rows_stride_head = t.rows->stride(1);
    view.scales_stride_page = t.scales->stride(0);
    view.scales_stride_head = t.scales->stride(1);
    return view;
}

// What all modes take: query, caches and how scores are made.
DecodeParams decode_params(const char* op, const Tensor& query, const CacheTensors& tensors,
                           const ScoreOptions& options, const MaybeTensor& sinks) {
    const Argument q{op, "query", query}, key{op, "key_cache", tensors.key};
    DecodeParams p;
    p.query = view4(q);
    p.dtype = element_type(q);
    p.batch = query.size(0);
    p.query_heads = query.size(1);
    p.query_len = query.size(2);
    p.head_dim = query.size(3);
    p.cache = view_cache(op, tensors, p.batch);
    check_device(key, q);
    p.kv_heads = tensors.key.size(1);
    check_status(validate_heads(op, p.query_heads, "key_cache", p.kv_heads));
    if (tensors.key.size(3) != p.head_dim)
        fail(op, "key_cache has shape " + shape_string(tensors.key) + " and query " +
                     shape_string(query) +
                     ", expected one head_dim; check that query is [batch, heads, seq, head_dim] "
                     "and the caches [pages, heads, tokens, head_dim].");
    p.scale = resolve_scale(options.scale, p.head_dim);
    p.softcap = static_cast<float>(options.softcap);
    p.sinks = optional_data<float>(op, "sinks", sinks, ScalarType::Float, q, {p.query_heads});
    return p;
}

void set_top_p(const char* op, const std::optional<double>& top_p, DecodeParams* p) {
    if (!top_p) return;
    if (!(*top_p > 0 && *top_p <= 1))
        fail(op, "top_p is " + std::to_string(*top_p) +
                     ", expected 0 < top_p <= 1; pass None to take topk tokens.");
    p->top_p = static_cast<float>(*top_p);
}

// Does the budget reach every key, however long a sequence is?
bool covers_capacity(const DecodeParams& p) {
    const int64_t scored = p.topk > p.shortlist ? p.topk : p.shortlist;
    const int64_t capacity = p.cache.capacity();
    return p.window >= capacity || p.anchors >= capacity || scored >= capacity ||
           p.window + p.anchors + scored >= capacity;
}

Tensor allocate_rows(const char* op, const Tensor& query) {
    return allocate(op, query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
}

Tensor allocate_out(const char* op, const Tensor& query) {
    return allocate(op, query, {query.size(0), query.size(1), query.size(2), query.size(3)},
                    query.scalar_type());
}

void set_out(Tensor& out, DecodeParams* p) {
    p->out = out.mutable_data_ptr();
    p->out_stride_batch = out.stride(0);
    p->out_stride_head = out.stride(1);
    p->out_stride_seq = out.stride(2);
}

void run(const char* op, const Tensor& query, DecodeParams* p) {
    const Executor executor = make_executor(op, query);
    const Workspace workspace(op, query, decode_workspace_bytes(*p, executor));
    p->workspace = workspace.data();
    check_status(condensate::attention_with_kvcache(*p, executor));
}

// Attention into `out`, after whatever the budget asks for.
std::tuple<Tensor, Tensor> attend_into(const char* op, const Tensor& query, Tensor& out,
                                       DecodeParams* p) {
    p->mode = covers_capacity(*p) ? DecodeMode::kDense : DecodeMode::kSelectAndAttend;
    Tensor lse = allocate_rows(op, query), estimate = allocate_rows(op, query);
    set_out(out, p);
    p->lse = static_cast<float*>(lse.mutable_data_ptr());
    p->omitted_mass_estimate = static_cast<float*>(estimate.mutable_data_ptr());
    run(op, query, p);
    return {lse, estimate};
}

void check_out(const Argument& out, const Argument& query) {
    view4(out);
    check_same_type_and_device(out, query);
    for (int i = 0; i < 4; ++i)
        if (out.tensor.size(i) != query.tensor.size(i))
            fail(out.op, "out has shape " + shape_string(out.tensor) + " and query " +
                             shape_string(query.tensor) +
                             ", expected equal shapes; allocate it with torch.empty_like(query).");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_with_kvcache(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, MaybeTensor block_table, MaybeTensor summaries,
    MaybeTensor summary_scales, MaybeTensor key_center, int64_t window, int64_t anchors,
    int64_t topk, int64_t shortlist, std::optional<double> top_p, bool far_field, MaybeTensor sinks,
    double softcap, std::optional<double> scale, MaybeTensor key_scale, MaybeTensor value_scale) {
    view4({"attention_with_kvcache", "query", query});
    Tensor out = allocate_out("attention_with_kvcache", query);
    const auto [lse, estimate] = attention_with_kvcache_(
        query, key_cache, value_cache, cache_seqlens, out, block_table, summaries, summary_scales,
        key_center, window, anchors, topk, shortlist, top_p, far_field, sinks, softcap, scale,
        key_scale, value_scale);
    return {out, lse, estimate};
}

std::tuple<Tensor, Tensor> attention_with_kvcache_(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, Tensor out, MaybeTensor block_table, MaybeTensor summaries,
    MaybeTensor summary_scales, MaybeTensor key_center, int64_t window, int64_t anchors,
    int64_t topk, int64_t shortlist, std::optional<double> top_p, bool far_field, MaybeTensor sinks,
    double softcap, std::optional<double> scale, MaybeTensor key_scale, MaybeTensor value_scale) {
    const char* op = "attention_with_kvcache";
    DecodeParams p = decode_params(
        op, query, {key_cache, value_cache, cache_seqlens, block_table, key_scale, value_scale},
        {scale, softcap}, sinks);
    check_out({op, "out", out}, {op, "query", query});
    p.summaries = view_summaries(op, {summaries, summary_scales, key_center},
                                 {op, "key_cache", key_cache}, p.cache);
    p.window = window;
    p.anchors = anchors;
    p.topk = topk;
    p.shortlist = shortlist;
    p.far_field = far_field;
    set_top_p(op, top_p, &p);
    return attend_into(op, query, out, &p);
}

std::tuple<Tensor, Tensor> select_tokens_with_kvcache(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, MaybeTensor block_table, MaybeTensor summaries,
    MaybeTensor summary_scales, MaybeTensor key_center, int64_t window, int64_t anchors,
    int64_t topk, int64_t shortlist, std::optional<double> top_p, double softcap,
    std::optional<double> scale, MaybeTensor key_scale) {
    const char* op = "select_tokens_with_kvcache";
    const MaybeTensor none;
    DecodeParams p = decode_params(
        op, query, {key_cache, value_cache, cache_seqlens, block_table, key_scale, none},
        {scale, softcap}, none);
    p.summaries = view_summaries(op, {summaries, summary_scales, key_center},
                                 {op, "key_cache", key_cache}, p.cache);
    p.mode = DecodeMode::kSelect;
    p.window = window;
    p.anchors = anchors;
    p.topk = topk;
    p.shortlist = shortlist;
    set_top_p(op, top_p, &p);
    if (topk < 0)
        fail(op, "topk is " + std::to_string(topk) + ", expected 0 <= topk; pass 0 for no tokens.");
    Tensor indices = allocate(op, query, {p.batch, p.kv_heads, p.query_len, topk}, ScalarType::Int);
    Tensor counts = allocate(op, query, {p.batch, p.kv_heads, p.query_len}, ScalarType::Int);
    p.token_indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    p.token_counts = static_cast<int32_t*>(counts.mutable_data_ptr());
    run(op, query, &p);
    return {indices, counts};
}

std::tuple<Tensor, Tensor> token_sparse_attention_with_kvcache(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, const Tensor& token_indices, const Tensor& token_counts,
    MaybeTensor block_table, int64_t window, int64_t anchors, MaybeTensor sinks, double softcap,
    std::optional<double> scale, MaybeTensor key_scale, MaybeTensor value_scale) {
    const char* op = "token_sparse_attention_with_kvcache";
    DecodeParams p = decode_params(
        op, query, {key_cache, value_cache, cache_seqlens, block_table, key_scale, value_scale},
        {scale, softcap}, sinks);
    if (token_indices.dim() != 4)
        fail(op, "token_indices has shape " + shape_string(token_indices) +
                     ", expected [batch, kv_heads, seq, tokens] as select_tokens_with_kvcache "
                     "returns it.");
    const Argument q{op, "query", query};
    p.mode = DecodeMode::kGivenTokens;
    p.window = window;
    p.anchors = anchors;
    p.topk = token_indices.size(3);
    check_contiguous({op, "token_indices", token_indices}, ScalarType::Int, q,
                     {p.batch, p.kv_heads, p.query_len, p.topk});
    check_contiguous({op, "token_counts", token_counts}, ScalarType::Int, q,
                     {p.batch, p.kv_heads, p.query_len});
    // Read only in this mode.
    p.token_indices = static_cast<int32_t*>(const_cast<void*>(token_indices.const_data_ptr()));
    p.token_counts = static_cast<int32_t*>(const_cast<void*>(token_counts.const_data_ptr()));
    Tensor out = allocate_out(op, query), lse = allocate_rows(op, query);
    set_out(out, &p);
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    run(op, query, &p);
    return {out, lse};
}

void update_kv_summaries_(Tensor summaries, Tensor summary_scales, const Tensor& key_cache,
                          const Tensor& value_cache, const Tensor& cache_seqlens, int64_t appended,
                          MaybeTensor block_table, MaybeTensor key_center, MaybeTensor key_scale,
                          MaybeTensor value_scale) {
    const char* op = "update_kv_summaries_";
    UpdateSummariesParams p;
    if (cache_seqlens.dim() != 1)
        fail(op, "cache_seqlens has shape " + shape_string(cache_seqlens) +
                     ", expected [batch]; reshape it.");
    p.batch = cache_seqlens.size(0);
    p.cache = view_cache(
        op, {key_cache, value_cache, cache_seqlens, block_table, key_scale, value_scale}, p.batch);
    p.kv_heads = key_cache.size(1);
    p.head_dim = key_cache.size(3);
    p.appended = appended;
    const MaybeTensor rows(summaries), scales(summary_scales);
    p.summaries =
        view_summaries(op, {rows, scales, key_center}, {op, "key_cache", key_cache}, p.cache);
    check_status(condensate::update_kv_summaries(p, make_executor(op, key_cache)));
}

}  // namespace condensate::ops
