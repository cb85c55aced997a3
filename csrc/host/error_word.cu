// The device half of the sticky error word.
#include <cuda_runtime.h>

#include <atomic>

#include "host/error_word.h"
#include "host/status.h"

namespace condensate {
namespace {

__device__ uint32_t g_error_word;  // zero when the module is loaded

constexpr int kMaxDevices = 64;
std::atomic<uint32_t*> g_addresses[kMaxDevices];  // by device; an address never changes

Status cuda_status(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return {};
    return make_status(StatusCode::kCudaError, "%s: %s.", what, cudaGetErrorString(error));
}

}  // namespace

Status cuda_error_word(uint32_t** address) {
    int device = 0;
    Status status = cuda_status("error word", cudaGetDevice(&device));
    if (!status.ok()) return status;
    bool cached = device >= 0 && device < kMaxDevices;
    if (cached) {
        *address = g_addresses[device].load(std::memory_order_acquire);
        if (*address != nullptr) return {};
    }
    void* symbol = nullptr;
    status = cuda_status("error word", cudaGetSymbolAddress(&symbol, g_error_word));
    if (!status.ok()) return status;
    *address = static_cast<uint32_t*>(symbol);
    if (cached) g_addresses[device].store(*address, std::memory_order_release);
    return {};
}

Status read_cuda_error(void* stream, bool clear, uint32_t* word) {
    cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    uint32_t* address = nullptr;
    Status status = cuda_error_word(&address);
    if (!status.ok()) return status;
    status = cuda_status("error word", cudaMemcpyAsync(word, address, sizeof(*word),
                                                       cudaMemcpyDeviceToHost, cuda_stream));
    if (!status.ok()) return status;
    if (clear)
        status = cuda_status("error word", cudaMemsetAsync(address, 0, sizeof(*word), cuda_stream));
    if (!status.ok()) return status;
    return cuda_status("error word", cudaStreamSynchronize(cuda_stream));
}

bool is_capturing(void* stream) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
    return error == cudaSuccess && capture != cudaStreamCaptureStatusNone;
}

}  // namespace condensate
