#include "host/device_info.h"

#include "condensate/condensate.h"
#include "host/status.h"

#if defined(CONDENSATE_WITH_CUDA)
#include <cuda_runtime_api.h>

#include <mutex>
#endif

namespace condensate {

#if defined(CONDENSATE_WITH_CUDA)
namespace {

constexpr int kMaxDevices = 64;
std::mutex g_mutex;
DeviceFacts g_facts[kMaxDevices];  // .cuda is set once the entry is filled

Status cuda_status(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return {};
    return make_status(StatusCode::kCudaError, "%s: %s.", what, cudaGetErrorString(error));
}

Status query_facts(int device, DeviceFacts* facts) {
    struct {
        cudaDeviceAttr attribute;
        int* value;
    } const queries[] = {
        {cudaDevAttrComputeCapabilityMajor, &facts->sm_major},
        {cudaDevAttrComputeCapabilityMinor, &facts->sm_minor},
        {cudaDevAttrMultiProcessorCount, &facts->sm_count},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &facts->max_smem_per_block_bytes},
    };
    for (const auto& query : queries) {
        Status status = cuda_status("device attributes",
                                    cudaDeviceGetAttribute(query.value, query.attribute, device));
        if (!status.ok()) return status;
    }
#if defined(CONDENSATE_WITH_SM90A)
    facts->sm90a_kernels = true;
#endif
    facts->index = device;
    facts->cuda = true;
    return {};
}

}  // namespace

Status cuda_device_facts(int device_index, DeviceFacts* facts) {
    if (device_index < 0 || device_index >= kMaxDevices)
        return make_status(StatusCode::kInvalidArgument,
                           "device index is %d, expected 0 to %d; use one of the visible devices.",
                           device_index, kMaxDevices - 1);
    std::lock_guard<std::mutex> lock(g_mutex);
    DeviceFacts& entry = g_facts[device_index];
    if (!entry.cuda) {
        DeviceFacts fresh;
        Status status = query_facts(device_index, &fresh);
        if (!status.ok()) return status;
        entry = fresh;
    }
    *facts = entry;
    return {};
}

DeviceGuard::DeviceGuard(int device_index) {
    int current = 0;
    status_ = cuda_status("current device", cudaGetDevice(&current));
    if (!status_.ok() || current == device_index) return;
    status_ = cuda_status("set device", cudaSetDevice(device_index));
    if (status_.ok()) restore_ = current;
}

DeviceGuard::~DeviceGuard() {
    if (restore_ >= 0) cudaSetDevice(restore_);
}

#else

Status cuda_device_facts(int, DeviceFacts*) {
    return make_status(
        StatusCode::kUnsupported,
        "the tensors are on a CUDA device, but this build of condensate has no CUDA "
        "kernels; reinstall it where nvcc is found, or move the tensors to the CPU.");
}

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;

#endif

bool built_with_cuda() {
#if defined(CONDENSATE_WITH_CUDA)
    return true;
#else
    return false;
#endif
}

const char* built_architectures() {
#if defined(CONDENSATE_BUILT_ARCHS)
    return CONDENSATE_BUILT_ARCHS;
#else
    return "";
#endif
}

}  // namespace condensate
