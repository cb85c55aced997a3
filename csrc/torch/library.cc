// Registration: the schemas, and one function per operator for CPU and CUDA tensors alike; the
// tensors' device decides where the core runs. Sizes are SymInt so that compiled graphs keep them
// symbolic. Fake kernels, autograd and autocast rules are in python/condensate_ext. Selectors are
// numbers (enum Selector), since the stable ABI leaks the string of every `str` argument.
#include <torch/csrc/stable/library.h>

#include "torch/decode.h"
#include "torch/ops.h"

STABLE_TORCH_LIBRARY(condensate, m) {
    m.def(
        "attention(Tensor query, Tensor key, Tensor value, *, SymInt window=256, "
        "SymInt anchors=64, SymInt topk=1728, Tensor? topk_per_head=None, float? top_p=None, "
        "bool? far_field=None, int selector=0, bool causal=True, float? scale=None) -> "
        "Tensor");
    m.def(
        "attention_forward(Tensor query, Tensor key, Tensor value, *, SymInt window=256, "
        "SymInt anchors=64, SymInt topk=1728, Tensor? topk_per_head=None, float? top_p=None, "
        "bool? far_field=None, int selector=0, bool causal=True, float? scale=None, "
        "bool estimate=True) -> (Tensor out, Tensor lse, Tensor omitted_mass_estimate)");
    m.def("block_summaries(Tensor key, *, int selector=0) -> Tensor");
    m.def(
        "select_blocks(Tensor query, Tensor summaries, Tensor? key=None, *, SymInt kv_len, "
        "SymInt window=256, SymInt anchors=64, SymInt topk=1728, Tensor? topk_per_head=None, "
        "float? top_p=None, bool far_field=True, int selector=0, bool causal=True, float? "
        "scale=None) "
        "-> (Tensor block_indices, Tensor block_counts)");
    m.def(
        "select_tokens(Tensor query, Tensor key, *, SymInt window=256, SymInt anchors=64, "
        "SymInt topk=1728, bool causal=True, float? scale=None) "
        "-> (Tensor threshold, Tensor tie_index)");
    m.def(
        "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, "
        "Tensor block_counts, *, SymInt window=256, SymInt anchors=64, bool far_field=True, "
        "bool causal=True, float? scale=None) -> (Tensor out, Tensor lse)");
    m.def(
        "omitted_mass(Tensor query, Tensor key, Tensor lse, *, Tensor? rows=None, "
        "bool causal=True, float? scale=None) -> Tensor");
    m.def(
        "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
        "-> (Tensor out, Tensor lse)");
    m.def(
        "attention_with_kvcache(Tensor query, Tensor key_cache, Tensor value_cache, Tensor "
        "cache_seqlens, *, Tensor? block_table=None, Tensor? summaries=None, Tensor? "
        "summary_scales=None, Tensor? key_center=None, SymInt window=256, SymInt "
        "anchors=64, SymInt topk=704, SymInt shortlist=4096, float? top_p=None, bool "
        "far_field=True, Tensor? sinks=None, float softcap=0.0, float? scale=None, Tensor? "
        "key_scale=None, Tensor? value_scale=None) -> (Tensor out, Tensor lse, Tensor "
        "omitted_mass_estimate)");
    m.def(
        "attention_with_kvcache_(Tensor query, Tensor key_cache, Tensor value_cache, Tensor"
        " cache_seqlens, Tensor(a!) out, *, Tensor? block_table=None, Tensor? "
        "summaries=None, Tensor? summary_scales=None, Tensor? key_center=None, SymInt "
        "window=256, SymInt anchors=64, SymInt topk=704, SymInt shortlist=4096, float? "
        "top_p=None, bool far_field=True, Tensor? sinks=None, float softcap=0.0, float? "
        "scale=None, Tensor? key_scale=None, Tensor? value_scale=None) -> (Tensor lse, "
        "Tensor omitted_mass_estimate)");
    m.def(
        "select_tokens_with_kvcache(Tensor query, Tensor key_cache, Tensor value_cache, "
        "Tensor cache_seqlens, *, Tensor? block_table=None, Tensor? summaries=None, Tensor?"
        " summary_scales=None, Tensor? key_center=None, SymInt window=256, SymInt "
        "anchors=64, SymInt topk=704, SymInt shortlist=4096, float? top_p=None, float "
        "softcap=0.0, float? scale=None, Tensor? key_scale=None) -> (Tensor token_indices, "
        "Tensor token_counts)");
    m.def(
        "token_sparse_attention_with_kvcache(Tensor query, Tensor key_cache, Tensor "
        "value_cache, Tensor cache_seqlens, Tensor token_indices, Tensor token_counts, *, "
        "Tensor? block_table=None, SymInt window=256, SymInt anchors=64, Tensor? "
        "sinks=None, float softcap=0.0, float? scale=None, Tensor? key_scale=None, Tensor? "
        "value_scale=None) -> (Tensor out, Tensor lse)");
    m.def(
        "update_kv_summaries_(Tensor(a!) summaries, Tensor(b!) summary_scales, Tensor "
        "key_cache, Tensor value_cache, Tensor cache_seqlens, *, SymInt appended, Tensor? "
        "block_table=None, Tensor? key_center=None, Tensor? key_scale=None, Tensor? "
        "value_scale=None) -> ()");
}

namespace {

template <typename Library>
void implement(Library& m) {
    using namespace condensate;
    m.impl("attention", TORCH_BOX(&ops::attention));
    m.impl("attention_forward", TORCH_BOX(&ops::attention_forward));
    m.impl("block_summaries", TORCH_BOX(&ops::block_summaries));
    m.impl("select_blocks", TORCH_BOX(&ops::select_blocks));
    m.impl("select_tokens", TORCH_BOX(&ops::select_tokens));
    m.impl("block_sparse_attention", TORCH_BOX(&ops::block_sparse_attention));
    m.impl("omitted_mass", TORCH_BOX(&ops::omitted_mass));
    m.impl("merge_states", TORCH_BOX(&ops::merge_states));
    m.impl("attention_with_kvcache", TORCH_BOX(&ops::attention_with_kvcache));
    m.impl("attention_with_kvcache_", TORCH_BOX(&ops::attention_with_kvcache_));
    m.impl("select_tokens_with_kvcache", TORCH_BOX(&ops::select_tokens_with_kvcache));
    m.impl("token_sparse_attention_with_kvcache",
           TORCH_BOX(&ops::token_sparse_attention_with_kvcache));
    m.impl("update_kv_summaries_", TORCH_BOX(&ops::update_kv_summaries_));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condensate, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(condensate, CUDA, m) { implement(m); }
