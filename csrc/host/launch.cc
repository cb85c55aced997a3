#include "host/launch.h"

#include <cstring>

#include "cpu/kernels.h"
#include "host/error_word.h"
#include "host/status.h"

namespace condensate {

Status make_context(const Executor& executor, Context* context) {
    context->executor = executor;
    context->facts = {};
    Status status = read_environment(&context->environment);
    if (!status.ok() || !executor.cuda) return status;
    return cuda_device_facts(executor.device_index, &context->facts);
}

Status fill_with_zero(void* data, int64_t bytes, const Executor& executor) {
    if (bytes == 0) return {};
    if (!executor.cuda) {
        std::memset(data, 0, static_cast<size_t>(bytes));
        return {};
    }
#if defined(CONDENSATE_WITH_CUDA)
    DeviceGuard guard(executor.device_index);
    if (!guard.status().ok()) return guard.status();
    const cudaError_t error = cudaMemsetAsync(data, 0, static_cast<size_t>(bytes),
                                              static_cast<cudaStream_t>(executor.stream));
    if (error != cudaSuccess)
        return make_status(StatusCode::kCudaError, "cudaMemsetAsync: %s.",
                           cudaGetErrorString(error));
#endif
    return {};
}

Status Launch::prepare() {
    if (!context_.facts.cuda) return cpu::check_isa();
    guard_.emplace(executor.device_index);
    if (!guard_->status().ok()) return guard_->status();
#if defined(CONDENSATE_WITH_CUDA)
    cuda.stream = static_cast<cudaStream_t>(executor.stream);
    cuda.sm_count = context_.facts.sm_count;
    cuda.sm_major = context_.facts.sm_major;
    cuda.max_smem_per_block_bytes = context_.facts.max_smem_per_block_bytes;
    return cuda_error_word(&cuda.error_word);
#else
    return {};
#endif
}

Status Launch::finish(Stage stage, bool reads_indices) {
    const bool checks = reads_indices && context_.environment.strict;
    if (!context_.facts.cuda) {
        if (checks) return status_of_error_word(stage_name(stage), errors);
        set_cpu_error(errors);
        return {};
    }
#if defined(CONDENSATE_WITH_CUDA)
    if (!checks || is_capturing(executor.stream)) return {};
    uint32_t word = 0;
    Status status = read_cuda_error(executor.stream, /*clear=*/true, &word);
    return status.ok() ? status_of_error_word(stage_name(stage), word) : status;
#else
    return {};
#endif
}

}  // namespace condensate
