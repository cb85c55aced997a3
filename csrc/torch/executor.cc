// Where a call runs: torch's current CUDA stream, or torch's CPU threads.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "host/status.h"
#include "torch/tensor_args.h"

// Lives in libtorch_cuda only: null in a CPU-only torch, which must still load this library.
#pragma weak aoti_torch_get_current_cuda_stream

namespace condensate::ops {
namespace {

// Later rows see more keys under causality, so equal shares would leave threads idle: workers take
// small pieces from a common counter instead.
void run_on_torch_threads(int64_t n, void (*body)(void* context, int64_t begin, int64_t end),
                          void* context) {
    constexpr int64_t kPiecesPerThread = 8;
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n);
    if (threads <= 1) {
        if (n > 0) body(context, 0, n);
        return;
    }
    const int64_t piece = std::max<int64_t>(1, n / (threads * kPiecesPerThread));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t begin = next.fetch_add(piece); begin < n; begin = next.fetch_add(piece))
            body(context, begin, std::min(begin + piece, n));
    });
}

}  // namespace

Status make_cuda_executor(int device_index, Executor* executor) {
    executor->cuda = true;
    executor->device_index = device_index;
    if (aoti_torch_get_current_cuda_stream != nullptr &&
        aoti_torch_get_current_cuda_stream(device_index, &executor->stream) == TORCH_SUCCESS)
        return {};
    return make_status(StatusCode::kUnsupported,
                       "torch gives no current stream of cuda:%d, expected a torch built with "
                       "CUDA and a device of that number; python -m condensate_ext doctor shows "
                       "what is found.",
                       device_index);
}

Executor make_executor(const char* op, const Tensor& like) {
    Executor executor;
    executor.parallel_for = run_on_torch_threads;
    if (!like.is_cuda()) return executor;
    const Status status = make_cuda_executor(like.get_device_index(), &executor);
    if (!status.ok()) throw std::runtime_error(std::string(op) + ": " + status.message);
    return executor;
}

}  // namespace condensate::ops
