// _C: facts of the build and of the devices. Nothing here touches a tensor, and no kernel is linked
// in: plans, and what a running call leaves behind, are read through _ops, where the kernels are.
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "host/device_info.h"

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

py::dict device_facts(int device_index) {
    if (device_index < 0)
        throw py::value_error("device_index is " + std::to_string(device_index) +
                              ", expected the number of a CUDA device, 0 or more.");
    DeviceFacts facts;
    check(cuda_device_facts(device_index, &facts));
    py::dict result;
    result["index"] = facts.index;
    result["compute_capability"] = py::make_tuple(facts.sm_major, facts.sm_minor);
    result["sm_count"] = facts.sm_count;
    result["max_smem_per_block_bytes"] = facts.max_smem_per_block_bytes;
    return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build facts and device facts of condensate_ext.";
    m.def("build_info", &build_info, "Version, compilers and GPU architectures of this build.");
    m.def("device_facts", &device_facts, py::arg("device_index"),
          "What a plan knows of a CUDA device.");
}
