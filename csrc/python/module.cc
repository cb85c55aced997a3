// _C: facts of the build, of the devices and of the plans. Nothing here touches a tensor, and no
// kernel is linked in: what a running call leaves behind is read through _ops, where the kernels
// are.
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "host/device_info.h"
#include "host/plan.h"

namespace py = pybind11;
using namespace condensate;

namespace {

void check(const Status& status) {
    if (status.ok()) return;
    if (status.code == StatusCode::kInvalidArgument) throw py::value_error(status.message);
    throw std::runtime_error(status.message);
}

py::dict build_info() {
    py::dict info;
    info["version"] = CONDENSATE_VERSION;
    info["cuda"] = py::bool_(CONDENSATE_WITH_CUDA);
    info["cuda_version"] = CONDENSATE_CUDA_VERSION;
    info["architectures"] = CONDENSATE_BUILT_ARCHS;
    info["compiler"] = "g++ " __VERSION__;
    info["torch_headers"] = CONDENSATE_TORCH_VERSION;
    return info;
}

DeviceFacts facts_of(int device_index) {
    DeviceFacts facts;  // as they are: the CPU
    if (device_index >= 0) check(cuda_device_facts(device_index, &facts));
    return facts;
}

py::dict device_facts(int device_index) {
    if (device_index < 0)
        throw py::value_error("device_index is " + std::to_string(device_index) +
                              ", expected the number of a CUDA device, 0 or more.");
    const DeviceFacts facts = facts_of(device_index);
    py::dict result;
    result["index"] = facts.index;
    result["compute_capability"] = py::make_tuple(facts.sm_major, facts.sm_minor);
    result["sm_count"] = facts.sm_count;
    result["max_smem_per_block_bytes"] = facts.max_smem_per_block_bytes;
    return result;
}

template <typename Enum, size_t kCount>
Enum parse(const char* what, const std::string& name,
           const std::pair<const char*, Enum> (&known)[kCount]) {
    std::string names;
    for (const auto& [text, value] : known) {
        if (name == text) return value;
        names += std::string(names.empty() ? "\"" : ", \"") + text + "\"";
    }
    throw py::value_error(std::string(what) + " is \"" + name + "\", expected one of " + names +
                          ".");
}

Selector parse_selector(const std::string& name) {
    return parse<Selector>("selector", name,
                           {{"block", Selector::kBlock},
                            {"quest", Selector::kQuest},
                            {"mean", Selector::kMean},
                            {"exact", Selector::kExact}});
}

DType parse_dtype(const std::string& name) {
    return parse<DType>("dtype", name,
                        {{"float16", DType::kFloat16},
                         {"bfloat16", DType::kBFloat16},
                         {"float32", DType::kFloat32}});
}

Stage parse_stage(const std::string& name) {
    return parse<Stage>("stage", name,
                        {{"block_summaries", Stage::kBlockSummaries},
                         {"select_blocks", Stage::kSelectBlocks},
                         {"select_tokens", Stage::kSelectTokens},
                         {"attention", Stage::kAttention},
                         {"omitted_mass", Stage::kOmittedMass},
                         {"merge_states", Stage::kMergeStates},
                         {"far_pools", Stage::kFarPools}});
}

std::string plan(const std::string& stage, int64_t batch, int64_t query_heads, int64_t kv_heads,
                 int64_t query_len, int64_t kv_len, int64_t head_dim, const std::string& dtype,
                 int64_t window, int64_t anchors, int64_t topk, const std::string& selector,
                 bool causal, bool far_field, int device_index) {
    if (kv_heads < 1 || query_heads < 1 || query_heads % kv_heads != 0)
        throw py::value_error("query_heads is " + std::to_string(query_heads) +
                              " and kv_heads is " + std::to_string(kv_heads) +
                              ", expected a multiple of kv_heads, both at least 1.");
    PlanRequest request;
    request.stage = parse_stage(stage);
    request.problem = {parse_dtype(dtype), batch,  query_heads, kv_heads, query_len, kv_len,
                       head_dim,           window, anchors,     causal,   1.0f};
    request.selector = parse_selector(selector);
    request.topk = topk;
    request.far_field = far_field;
    Policy policy;
    Plan result;
    check(policy_from_environment(&policy));
    check(make_plan(request, facts_of(device_index), policy, &result));
    return to_string(result);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build facts, device facts and launch plans of condensate_ext.";
    m.def("build_info", &build_info, "Version, compilers and GPU architectures of this build.");
    m.def("device_facts", &device_facts, py::arg("device_index"),
          "What a plan knows of a CUDA device.");
    m.def("plan", &plan, py::arg("stage") = "attention", py::kw_only(), py::arg("batch"),
          py::arg("query_heads"), py::arg("kv_heads"), py::arg("query_len"), py::arg("kv_len"),
          py::arg("head_dim"), py::arg("dtype") = "bfloat16", py::arg("window") = 256,
          py::arg("anchors") = 64, py::arg("topk") = 1728, py::arg("selector") = "block",
          py::arg("causal") = true, py::arg("far_field") = false, py::arg("device_index") = -1,
          "One line: which path a call with these shapes takes, why, and how its work is cut. "
          "device_index -1 plans for the CPU.");
}
