// Runs the decoding stages: parameters checked, one path chosen, launched.
#include "host/decode.h"

#include <exception>

#include "condensate/condensate.h"
#include "cpu/kernels.h"
#include "host/device_info.h"
#include "host/error_word.h"
#include "host/plan.h"
#include "host/status.h"
#include "reference/reference.h"

#if defined(CONDENSATE_WITH_CUDA)
#include "kernels/launchers.h"
#endif

namespace condensate {
namespace {

const char* name_of(const DecodeParams&) { return "attention_with_kvcache"; }
const char* name_of(const UpdateSummariesParams&) { return "update_kv_summaries"; }

bool writes_nothing(const DecodeParams& p) { return p.batch == 0 || p.query_len == 0; }
bool writes_nothing(const UpdateSummariesParams& p) {
    return p.batch == 0 || p.kv_heads == 0 || p.appended == 0 || p.cache.capacity() == 0;
}

void run_reference(const DecodeParams& p, uint32_t* errors) {
    reference::attention_with_kvcache(p, errors);
}
void run_reference(const UpdateSummariesParams& p, uint32_t* errors) {
    reference::update_kv_summaries(p, errors);
}
Status run_fast(const DecodeParams& p, const Executor& executor, uint32_t* errors) {
    return cpu::attention_with_kvcache(p, executor, errors);
}
Status run_fast(const UpdateSummariesParams& p, const Executor& executor, uint32_t* errors) {
    return cpu::update_kv_summaries(p, executor, errors);
}

template <class Params>
Status run_on_cpu(const Params& params, const Policy& policy, const Executor& executor) {
    uint32_t errors = 0;
    Status status = cpu::check_isa();
    if (!status.ok()) return status;
    try {
        if (policy.forced && policy.path == Path::kCpuReference)
            run_reference(params, &errors);
        else
            status = run_fast(params, executor, &errors);
    } catch (const std::exception& error) {  // out of memory
        return make_status(StatusCode::kUnsupported, "%s: the host has no memory left: %s.",
                           name_of(params), error.what());
    }
    if (status.ok() && is_strict()) return status_of_error_word(name_of(params), errors);
    set_cpu_error(errors);
    return status;
}

#if defined(CONDENSATE_WITH_CUDA)

using kernels::LaunchContext;

Status launch(const DecodeParams& p, const LaunchContext& context) {
    return kernels::decode_attention(p, context);
}
Status launch(const UpdateSummariesParams& p, const LaunchContext& context) {
    return kernels::update_summaries(p, context);
}

LaunchContext context_of(const DeviceFacts& facts, const Executor& executor) {
    LaunchContext context;
    context.stream = static_cast<cudaStream_t>(executor.stream);
    context.sm_count = facts.sm_count;
    context.sm_major = facts.sm_major;
    context.max_smem_per_block_bytes = facts.max_smem_per_block_bytes;
    return context;
}

template <class Params>
Status run_on_cuda(const Params& params, const DeviceFacts& facts, const Executor& executor) {
    DeviceGuard guard(executor.device_index);
    if (!guard.status().ok()) return guard.status();
    LaunchContext context = context_of(facts, executor);
    Status status = cuda_error_word(&context.error_word);
    if (!status.ok()) return status;
    status = launch(params, context);
    if (!status.ok() || !is_strict() || is_capturing(executor.stream)) return status;
    uint32_t word = 0;
    status = read_cuda_error(executor.stream, /*clear=*/true, &word);
    return status.ok() ? status_of_error_word(name_of(params), word) : status;
}

int64_t cuda_workspace_bytes(const DecodeParams& p, const DeviceFacts& facts,
                             const Executor& executor) {
    return kernels::decode_workspace_bytes(p, context_of(facts, executor));
}

#else

template <class Params>
Status run_on_cuda(const Params&, const DeviceFacts& facts, const Executor&) {
    DeviceFacts unused = facts;
    return cuda_device_facts(0, &unused);  // says what to install
}

int64_t cuda_workspace_bytes(const DecodeParams&, const DeviceFacts&, const Executor&) { return 0; }

#endif  // CONDENSATE_WITH_CUDA

// One path serves every call on CUDA, so any of its names may be forced there.
Status check_forced(const char* op, const Policy& policy, bool cuda) {
    const bool on_cpu = policy.path == Path::kCpu || policy.path == Path::kCpuReference;
    if (!policy.forced || on_cpu != cuda) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: CONDENSATE_FORCE_PATH is %s, which cannot run this call: the tensors "
                       "are on %s; unset it, or force %s.",
                       op, path_name(policy.path), cuda ? "a CUDA device" : "the CPU",
                       cuda ? "simt" : "cpu or cpu_reference");
}

template <class Params>
Status run(const Params& params, const Executor& executor) {
    Status status = validate(params);
    if (!status.ok() || writes_nothing(params)) return status;
    Policy policy;
    status = policy_from_environment(&policy);
    if (status.ok()) status = check_forced(name_of(params), policy, executor.cuda);
    if (!status.ok()) return status;
    if (!executor.cuda) return run_on_cpu(params, policy, executor);
    DeviceFacts facts;
    status = cuda_device_facts(executor.device_index, &facts);
    return status.ok() ? run_on_cuda(params, facts, executor) : status;
}

}  // namespace

int64_t decode_workspace_bytes(const DecodeParams& params, const Executor& executor) {
    DeviceFacts facts;
    if (!executor.cuda || !validate(params).ok() || writes_nothing(params) ||
        !cuda_device_facts(executor.device_index, &facts).ok())
        return 0;  // the call itself reports what is wrong
    return cuda_workspace_bytes(params, facts, executor);
}

Status attention_with_kvcache(const DecodeParams& params, const Executor& executor) {
    return run(params, executor);
}
Status update_kv_summaries(const UpdateSummariesParams& params, const Executor& executor) {
    return run(params, executor);
}

}  // namespace condensate
