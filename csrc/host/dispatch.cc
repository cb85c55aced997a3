// The one place that maps a plan to a launcher.
#include "host/dispatch.h"

#include <exception>

#include "cpu/kernels.h"
#include "host/device_info.h"
#include "host/error_word.h"
#include "host/status.h"
#include "host/validate.h"
#include "reference/reference.h"

#if defined(CONDENSATE_WITH_CUDA)
#include "kernels/launchers.h"
#endif

namespace condensate {
namespace {

thread_local Plan t_last_plan;

Status facts_of(const Executor& executor, DeviceFacts* facts) {
    *facts = {};
    return executor.cuda ? cuda_device_facts(executor.device_index, facts) : Status{};
}

// ---- What each stage tells the plan ----

// Of a stage that reads keys without queries.
template <class Params>
PlanRequest request_without_queries(Stage stage, const Params& p) {
    PlanRequest request;
    request.stage = stage;
    request.problem.dtype = p.dtype;
    request.problem.batch = p.batch;
    request.problem.query_heads = request.problem.kv_heads = max_i64(p.kv_heads, 1);
    request.problem.kv_len = p.kv_len;
    return request;
}

PlanRequest request_of(const BlockSummaryParams& p) {
    PlanRequest request = request_without_queries(Stage::kBlockSummaries, p);
    request.selector = p.selector;
    return request;
}

PlanRequest request_of(const FarPoolsParams& p) {
    return request_without_queries(Stage::kFarPools, p);
}

PlanRequest request_of(const BlockSelectParams& p) {
    PlanRequest request;
    request.stage = Stage::kSelectBlocks;
    request.problem = p.problem;
    request.selector = p.selector;
    request.topk = p.max_blocks * kBlockKeys;
    request.max_blocks = p.max_blocks;
    const bool reads_keys = p.refinement() == Refinement::kKeys;
    request.aligned = is_aligned16(p.query, p.problem.dtype) && is_aligned16(p.summaries) &&
                      (!reads_keys || is_aligned16(p.key, p.problem.dtype));
    return request;
}

PlanRequest request_of(const TokenSelectParams& p) {
    PlanRequest request;
    request.stage = Stage::kSelectTokens;
    request.problem = p.problem;
    request.selector = Selector::kExact;
    request.topk = p.topk;
    request.aligned = is_aligned16(p.query, p.problem.dtype) &&
                      is_aligned16(p.key, p.problem.dtype) &&
                      is_aligned16(p.value, p.problem.dtype);
    return request;
}

bool has_lists(const AttentionParams& p) { return p.max_blocks > 0 && p.block_indices != nullptr; }

PlanRequest request_of(const AttentionParams& p) {
    PlanRequest request;
    request.stage = Stage::kAttention;
    request.problem = p.problem;
    request.given_lists = has_lists(p);
    request.max_blocks = p.max_blocks;
    request.given_tokens = p.threshold != nullptr;
    DType dtype = p.problem.dtype;
    request.aligned = is_aligned16(p.query, dtype) && is_aligned16(p.key, dtype) &&
                      is_aligned16(p.value, dtype) && is_aligned16(p.out);
    request.far_field = p.far_field.key.given();
    if (request.far_field) request.aligned = request.aligned && is_aligned16(p.far_field, dtype);
    const Problem& problem = p.problem;
    request.boxed = is_boxed(p.query, problem.batch, problem.query_heads, problem.query_len) &&
                    is_boxed(p.key, problem.batch, problem.kv_heads, problem.kv_len) &&
                    is_boxed(p.value, problem.batch, problem.kv_heads, problem.kv_len);
    return request;
}

PlanRequest request_of(const OmittedMassParams& p) {
    PlanRequest request;
    request.stage = Stage::kOmittedMass;
    request.problem = p.problem;
    request.aligned =
        is_aligned16(p.query, p.problem.dtype) && is_aligned16(p.key, p.problem.dtype);
    return request;
}

PlanRequest request_of(const MergeStatesParams& p) {
    PlanRequest request;
    request.stage = Stage::kMergeStates;
    request.problem.dtype = p.dtype;
    request.problem.query_heads = request.problem.kv_heads = 1;
    request.problem.query_len = p.rows;
    return request;
}

// ---- Which stages have nothing to write ----

bool writes_nothing(const Problem& p) { return p.batch == 0 || p.query_len == 0; }
template <class Params>
bool has_no_keys(const Params& p) {
    return p.batch == 0 || p.kv_heads == 0 || p.kv_len == 0;
}
bool writes_nothing(const BlockSummaryParams& p) { return has_no_keys(p); }
bool writes_nothing(const FarPoolsParams& p) { return has_no_keys(p); }
bool writes_nothing(const BlockSelectParams& p) { return writes_nothing(p.problem); }
bool writes_nothing(const TokenSelectParams& p) { return writes_nothing(p.problem); }
bool writes_nothing(const AttentionParams& p) { return writes_nothing(p.problem); }
bool writes_nothing(const OmittedMassParams& p) {
    return writes_nothing(p.problem) || p.num_rows == 0;
}
bool writes_nothing(const MergeStatesParams& p) { return p.rows == 0; }

// ---- Can the contents of a tensor be invalid, so that strict mode has something to check? ----

template <class Params>
bool reads_caller_indices(const Params&) {
    return false;
}
bool reads_caller_indices(const AttentionParams& p) { return has_lists(p); }
bool reads_caller_indices(const OmittedMassParams& p) { return p.rows != nullptr; }

// ---- The launchers of each stage ----

struct CpuCall {
    const Executor& executor;
    uint32_t errors = 0;  // ErrorBit of this call
};

Status run_reference(const BlockSummaryParams& p, CpuCall&) {
    reference::block_summaries<double>(p);
    return {};
}
Status run_reference(const BlockSelectParams& p, CpuCall&) {
    reference::select_blocks<double>(p);
    return {};
}
Status run_reference(const TokenSelectParams& p, CpuCall&) {
    reference::select_tokens<double>(p);
    return {};
}
Status run_reference(const FarPoolsParams& p, CpuCall&) {
    reference::far_pools<double>(p);
    return {};
}
Status run_reference(const AttentionParams& p, CpuCall& call) {
    reference::attention<double>(p, &call.errors);
    return {};
}
Status run_reference(const OmittedMassParams& p, CpuCall& call) {
    reference::omitted_mass<double>(p, &call.errors);
    return {};
}
Status run_reference(const MergeStatesParams& p, CpuCall&) {
    reference::merge_states<double>(p);
    return {};
}

Status run_fast(const BlockSummaryParams& p, CpuCall& call) {
    return cpu::block_summaries(p, call.executor);
}
Status run_fast(const BlockSelectParams& p, CpuCall& call) {
    return cpu::select_blocks(p, call.executor);
}
Status run_fast(const TokenSelectParams& p, CpuCall& call) {
    return cpu::select_tokens(p, call.executor);
}
Status run_fast(const FarPoolsParams& p, CpuCall& call) { return cpu::far_pools(p, call.executor); }
Status run_fast(const AttentionParams& p, CpuCall& call) {
    return cpu::attention(p, call.executor, &call.errors);
}
Status run_fast(const OmittedMassParams& p, CpuCall& call) {
    return cpu::omitted_mass(p, call.executor, &call.errors);
}
Status run_fast(const MergeStatesParams& p, CpuCall& call) {
    return cpu::merge_states(p, call.executor);
}

template <class Params>
Status run_on_cpu(const Params& params, const Plan& plan, const Executor& executor) {
    CpuCall call{executor};
    Status status = cpu::check_isa();
    if (!status.ok()) return status;
    try {
        status =
            plan.path == Path::kCpuReference ? run_reference(params, call) : run_fast(params, call);
    } catch (const std::exception& error) {  // out of memory
        return make_status(StatusCode::kUnsupported, "%s: the host has no memory left: %s.",
                           stage_name(plan.stage), error.what());
    }
    if (status.ok() && is_strict() && reads_caller_indices(params))
        return status_of_error_word(stage_name(plan.stage), call.errors);
    set_cpu_error(call.errors);
    return status;
}

#if defined(CONDENSATE_WITH_CUDA)

using kernels::LaunchContext;

Status launch(const BlockSummaryParams& p, Path, const LaunchContext& context) {
    return kernels::block_summary(p, context);
}
Status launch(const BlockSelectParams& p, Path path, const LaunchContext& context) {
#if defined(CONDENSATE_WITH_SM90A)
    if (path == Path::kSm90) return kernels::block_select_sm90(p, context);
#endif
    return path == Path::kSm80 ? kernels::block_select_sm80(p, context)
                               : kernels::block_select_simt(p, context);
}
Status launch(const TokenSelectParams& p, Path path, const LaunchContext& context) {
    return path == Path::kSm80 ? kernels::token_select_sm80(p, context)
                               : kernels::token_select_simt(p, context);
}
Status launch(const FarPoolsParams& p, Path, const LaunchContext& context) {
    return kernels::far_pools_cuda(p, context);
}
Status launch(const AttentionParams& p, Path path, const LaunchContext& context) {
#if defined(CONDENSATE_WITH_SM90A)
    if (path == Path::kSm90) return kernels::attention_sm90(p, context);
#endif
    return path == Path::kSm80 ? kernels::attention_sm80(p, context)
                               : kernels::attention_simt(p, context);
}
Status launch(const OmittedMassParams& p, Path path, const LaunchContext& context) {
    return path == Path::kSm80 ? kernels::omitted_mass_sm80(p, context)
                               : kernels::omitted_mass_simt(p, context);
}
Status launch(const MergeStatesParams& p, Path, const LaunchContext& context) {
    return kernels::merge_states(p, context);
}

int64_t cuda_workspace_bytes(const BlockSelectParams& p, Path path, int sm_count) {
    return path == Path::kSimt ? kernels::block_select_simt_workspace_bytes(p, sm_count)
                               : kernels::block_select_workspace_bytes(p, sm_count);
}

template <class Params>
Status run_on_cuda(const Params& params, const Plan& plan, const DeviceFacts& facts,
                   const Executor& executor) {
    DeviceGuard guard(executor.device_index);
    if (!guard.status().ok()) return guard.status();
    LaunchContext context;
    context.stream = static_cast<cudaStream_t>(executor.stream);
    context.sm_count = facts.sm_count;
    context.max_smem_per_block_bytes = facts.max_smem_per_block_bytes;
    Status status = cuda_error_word(&context.error_word);
    if (!status.ok()) return status;
    status = launch(params, plan.path, context);
    bool check = is_strict() && reads_caller_indices(params) && !is_capturing(executor.stream);
    if (!status.ok() || !check) return status;
    uint32_t word = 0;
    status = read_cuda_error(executor.stream, /*clear=*/true, &word);
    return status.ok() ? status_of_error_word(stage_name(plan.stage), word) : status;
}

#else

int64_t cuda_workspace_bytes(const BlockSelectParams&, Path, int) { return 0; }

template <class Params>
Status run_on_cuda(const Params&, const Plan&, const DeviceFacts& facts, const Executor&) {
    DeviceFacts unused = facts;
    return cuda_device_facts(0, &unused);  // says what to install
}

#endif  // CONDENSATE_WITH_CUDA

template <class Params>
Status plan_params(const Params& params, const Executor& executor, DeviceFacts* facts, Plan* plan) {
    Policy policy;
    Status status = policy_from_environment(&policy);
    if (!status.ok()) return status;
    status = facts_of(executor, facts);
    if (!status.ok()) return status;
    return make_plan(request_of(params), *facts, policy, plan);
}

// Ranges beyond every key mean the same as ranges up to it, and keep the kernels' sums small.
template <class Params>
void clamp_ranges(Params* params) {
    Problem& problem = params->problem;
    problem.window = min_i64(problem.window, problem.kv_len + problem.query_len);
    problem.anchors = min_i64(problem.anchors, problem.kv_len);
}
void clamp_ranges(BlockSummaryParams*) {}
void clamp_ranges(FarPoolsParams*) {}
void clamp_ranges(MergeStatesParams*) {}

template <class Params>
Status run(Params params, const Executor& executor) {
    Status status = validate(params);
    if (!status.ok()) return status;
    clamp_ranges(&params);
    DeviceFacts facts;
    Plan plan;
    status = plan_params(params, executor, &facts, &plan);
    if (!status.ok()) return status;
    t_last_plan = plan;
    if (writes_nothing(params)) return {};
    return facts.cuda ? run_on_cuda(params, plan, facts, executor)
                      : run_on_cpu(params, plan, executor);
}

}  // namespace

int64_t block_select_workspace_bytes(const BlockSelectParams& params, const Executor& executor) {
    DeviceFacts facts;
    Plan plan;
    if (!executor.cuda || params.problem.kv_heads < 1 || params.problem.query_heads < 1) return 0;
    if (!plan_params(params, executor, &facts, &plan).ok()) return 0;  // the call itself reports it
    return cuda_workspace_bytes(params, plan.path, facts.sm_count);
}

Status block_summaries(const BlockSummaryParams& params, const Executor& executor) {
    return run(params, executor);
}
Status select_blocks(const BlockSelectParams& params, const Executor& executor) {
    return run(params, executor);
}
Status select_tokens(const TokenSelectParams& params, const Executor& executor) {
    return run(params, executor);
}
Status far_pools(const FarPoolsParams& params, const Executor& executor) {
    return run(params, executor);
}
Status attention(const AttentionParams& params, const Executor& executor) {
    return run(params, executor);
}
Status omitted_mass(const OmittedMassParams& params, const Executor& executor) {
    return run(params, executor);
}
Status merge_states(const MergeStatesParams& params, const Executor& executor) {
    return run(params, executor);
}

Status plan_call(const PlanRequest& request, const Executor& executor, Plan* plan) {
    Policy policy;
    DeviceFacts facts;
    Status status = policy_from_environment(&policy);
    if (status.ok()) status = facts_of(executor, &facts);
    if (status.ok()) status = make_plan(request, facts, policy, plan);
    if (!status.ok() || !facts.cuda || plan->selection != Selection::kBlocks) return status;
    BlockSelectParams params;
    params.problem = request.problem;
    params.selector = request.selector;
    params.max_blocks = plan->list_width;
    // attention gives the keys; for the size it only counts that there are some.
    if (request.stage == Stage::kAttention) params.key.data = &request;
    plan->workspace_bytes = cuda_workspace_bytes(params, plan->path, facts.sm_count);
    return {};
}

const Plan& last_plan() { return t_last_plan; }

Status read_error_word(const Executor& executor, bool clear, uint32_t* word) {
    if (!executor.cuda) {
        *word = read_cpu_error(clear);
        return {};
    }
#if defined(CONDENSATE_WITH_CUDA)
    DeviceGuard guard(executor.device_index);
    if (!guard.status().ok()) return guard.status();
    return read_cuda_error(executor.stream, clear, word);
#else
    DeviceFacts facts;
    return cuda_device_facts(executor.device_index, &facts);
#endif
}

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
