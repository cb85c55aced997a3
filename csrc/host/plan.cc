#include "host/plan.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/status.h"

namespace condensate {
namespace {

constexpr Path kPaths[] = {Path::kCpuReference, Path::kCpu, Path::kSm80, Path::kSimt, Path::kSm90};

bool runs_on_cuda(Path path) { return path != Path::kCpuReference && path != Path::kCpu; }

// Stages without wgmma kernels run their sm80 ones when sm90 is forced.
bool has_sm90_kernel(const PlanRequest& request) {
    if (request.stage == Stage::kSelectBlocks) return request.selector == Selector::kBlock;
    return request.stage == Stage::kAttention && !request.given_tokens;
}

// One kernel serves these stages on CUDA whatever the dtype, so sm80 and simt mean the same.
bool has_one_cuda_kernel(Stage stage) {
    return stage == Stage::kBlockSummaries || stage == Stage::kMergeStates ||
           stage == Stage::kFarPools;
}

// Query heads per KV head whose pooled queries fit a warp's 16 rows, or its 32 (block alone).
constexpr int kNarrowGroup = 16;
constexpr int kWideGroup = 32;
constexpr int kMaxSummaryDim = 256;  // a stage of summaries in 99 KB of shared memory

// Null when the sm80 path can run the call, otherwise why not.
const char* sm80_obstacle(const PlanRequest& request, const DeviceFacts& facts) {
    if (facts.sm_major < 8) return "compute capability below 8.0";
    if (request.problem.dtype == DType::kFloat32) return "float32 has no mma path";
    if (!request.aligned) return "a pointer or stride is not a multiple of 16 bytes";
    if (request.stage == Stage::kSelectBlocks) {
        const Problem& p = request.problem;
        if (p.group() > kWideGroup) return "more than 32 query heads per KV head to score";
        if (p.group() > kNarrowGroup && request.selector != Selector::kBlock)
            return "more than 16 query heads per KV head to score";
        if (summary_dim(request.selector, static_cast<int>(p.head_dim)) > kMaxSummaryDim)
            return "summaries of more than 256 elements";
    }
    return nullptr;
}

// The same for the sm90 path of a stage that has one.
const char* sm90_obstacle(const PlanRequest& request, const DeviceFacts& facts) {
    const Problem& p = request.problem;
    if (const char* obstacle = sm80_obstacle(request, facts)) return obstacle;
    if (facts.sm_major != 9 || !facts.sm90a_kernels)
        return "not compute capability 9.0, or a build without 90a";
    if (p.group() > kNarrowGroup) return "more than 16 query heads per KV head";
    if (p.kv_len < 1) return "no keys";
    if (request.stage == Stage::kSelectBlocks)
        return p.head_dim > 128 ? "summaries of more than 128 elements" : nullptr;
    if (p.head_dim != 64 && p.head_dim != 128) return "head_dim is neither 64 nor 128";
    if (p.query_len < tile_positions(p.group())) return "fewer queries than a tile";
    if (!request.boxed) return "a stride that the copy engine cannot take";
    return nullptr;
}

Path best_cuda_path(const PlanRequest& request, const DeviceFacts& facts, const char** reason) {
    *reason = "the stage's one CUDA kernel";
    if (has_one_cuda_kernel(request.stage)) return Path::kSimt;
    *reason = sm80_obstacle(request, facts);
    if (*reason != nullptr) return Path::kSimt;
    *reason = "half precision, aligned, sm >= 8.0";
    if (!has_sm90_kernel(request)) return Path::kSm80;
    *reason = sm90_obstacle(request, facts);
    if (*reason != nullptr) return Path::kSm80;
    *reason = "half precision, aligned, sm 9.0";
    return Path::kSm90;
}

// Null when the call can run on the forced path.
const char* forced_obstacle(const PlanRequest& request, const DeviceFacts& facts, Path path) {
    if (runs_on_cuda(path) != facts.cuda)
        return facts.cuda ? "the tensors are on a CUDA device" : "the tensors are on the CPU";
    if (has_one_cuda_kernel(request.stage)) return nullptr;
    if (path == Path::kSm90 && has_sm90_kernel(request)) return sm90_obstacle(request, facts);
    return path == Path::kSm80 || path == Path::kSm90 ? sm80_obstacle(request, facts) : nullptr;
}

Status choose_path(const PlanRequest& request, const DeviceFacts& facts, const Policy& policy,
                   Plan* plan) {
    if (!policy.forced) {
        const char* reason = "tensors are on the CPU";
        plan->path = facts.cuda ? best_cuda_path(request, facts, &reason) : Path::kCpu;
        std::snprintf(plan->reason, sizeof(plan->reason), "%s", reason);
        return {};
    }
    if (const char* obstacle = forced_obstacle(request, facts, policy.path))
        return make_status(StatusCode::kInvalidArgument,
                           "%s: CONDENSATE_FORCE_PATH is %s, which cannot run this call: %s; unset "
                           "it, or force %s.",
                           stage_name(request.stage), path_name(policy.path), obstacle,
                           facts.cuda ? "simt" : "cpu or cpu_reference");
    plan->path = policy.path;
    if (policy.path == Path::kSm90 && !has_sm90_kernel(request)) plan->path = Path::kSm80;
    std::snprintf(plan->reason, sizeof(plan->reason), "forced by CONDENSATE_FORCE_PATH");
    return {};
}

int64_t whole_blocks(int64_t keys) { return ceil_div(keys, kBlockKeys) * kBlockKeys; }

// Anchors and window of a full row, at most. With the far field they are whole blocks, those of the
// tile's windows together, which may begin and end inside a block.
int64_t range_keys(const PlanRequest& request) {
    const Problem& p = request.problem;
    const int64_t window = p.causal ? p.window : max_i64(2 * p.window - 1, 0);
    if (!request.far_field) return p.anchors + window;
    const int64_t span = window > 0 ? window + tile_positions(p.group()) - 1 : 0;
    const int64_t cut = window > 0 ? kBlockKeys : 0;
    return whole_blocks(p.anchors) + whole_blocks(span) + cut;
}

void describe_work(const PlanRequest& request, Plan* plan) {
    const Problem& p = request.problem;
    int group = p.group();
    if (request.stage == Stage::kFarPools) plan->far_pools = num_far_pools(p.kv_len);
    plan->tile_positions = tile_positions(group);
    plan->tiles = p.batch * p.kv_heads * num_tiles(p.query_len, group);
    bool selects = request.stage == Stage::kAttention || request.stage == Stage::kSelectBlocks ||
                   request.stage == Stage::kSelectTokens;
    if (!selects) return;

    bool exact = request.selector == Selector::kExact;
    int64_t selected_keys = 0;
    if (request.given_lists) {
        plan->selection = Selection::kGiven;
        plan->list_width = request.max_blocks;
        selected_keys = request.max_blocks * kBlockKeys;
    } else if (request.given_tokens) {
        plan->selection = Selection::kTokens;
        selected_keys = p.kv_len;  // the thresholds say how many
    } else if (request.stage == Stage::kAttention &&
               attends_everything(p.ranges(), p.query_len, request.topk, request.selector)) {
        plan->selection = budget_covers(p.ranges(), request.topk, request.selector)
                              ? Selection::kCovered
                              : Selection::kDense;
        selected_keys = p.kv_len;
    } else if (request.topk > 0) {
        plan->selection = exact ? Selection::kTokens : Selection::kBlocks;
        plan->list_width = exact ? 0 : request.topk / kBlockKeys;
        plan->summary_rows = exact ? 0 : summary_rows(request.selector, p.kv_len);
        selected_keys = request.topk;
    }
    const bool attends_all =
        plan->selection == Selection::kCovered || plan->selection == Selection::kDense;
    if (request.far_field && !attends_all) plan->far_pools = num_far_pools(p.kv_len);
    plan->keys_per_query = min_i64(p.kv_len, range_keys(request) + selected_keys);
}

}  // namespace

const char* path_name(Path path) {
    switch (path) {
        case Path::kCpuReference:
            return "cpu_reference";
        case Path::kCpu:
            return "cpu";
        case Path::kSm80:
            return "sm80";
        case Path::kSimt:
            return "simt";
        case Path::kSm90:
            return "sm90";
    }
    return "unknown";
}

const char* stage_name(Stage stage) {
    switch (stage) {
        case Stage::kBlockSummaries:
            return "block_summaries";
        case Stage::kSelectBlocks:
            return "select_blocks";
        case Stage::kSelectTokens:
            return "select_tokens";
        case Stage::kAttention:
            return "attention";
        case Stage::kOmittedMass:
            return "omitted_mass";
        case Stage::kMergeStates:
            return "merge_states";
        case Stage::kFarPools:
            return "far_pools";
    }
    return "unknown";
}

const char* selection_name(Selection selection) {
    switch (selection) {
        case Selection::kCovered:
            return "covered";
        case Selection::kDense:
            return "dense";
        case Selection::kTokens:
            return "tokens";
        case Selection::kBlocks:
            return "blocks";
        case Selection::kGiven:
            return "given";
        case Selection::kNone:
            return "none";
    }
    return "unknown";
}

Status policy_from_environment(Policy* policy) {
    *policy = {};
    const char* value = std::getenv("CONDENSATE_FORCE_PATH");
    if (value == nullptr || value[0] == '\0') return {};
    for (Path path : kPaths) {
        if (std::strcmp(value, path_name(path)) != 0) continue;
        *policy = {true, path};
        return {};
    }
    return make_status(StatusCode::kInvalidArgument,
                       "CONDENSATE_FORCE_PATH is \"%.64s\", expected cpu_reference, cpu, sm80, "
                       "simt or sm90; unset it to let the plan choose.",
                       value);
}

Status make_plan(const PlanRequest& request, const DeviceFacts& facts, const Policy& policy,
                 Plan* plan) {
    *plan = {};
    plan->stage = request.stage;
    Status status = choose_path(request, facts, policy, plan);
    if (status.ok()) describe_work(request, plan);
    return status;
}

std::string to_string(const Plan& plan) {
    char line[512];
    std::snprintf(
        line, sizeof(line),
        "%s: path=%s (%s) selection=%s tiles=%lld x %lld positions list_width=%lld "
        "summary_rows=%lld far_pools=%lld keys_per_query<=%lld workspace=%lld bytes",
        stage_name(plan.stage), path_name(plan.path), plan.reason, selection_name(plan.selection),
        static_cast<long long>(plan.tiles), static_cast<long long>(plan.tile_positions),
        static_cast<long long>(plan.list_width), static_cast<long long>(plan.summary_rows),
        static_cast<long long>(plan.far_pools), static_cast<long long>(plan.keys_per_query),
        static_cast<long long>(plan.workspace_bytes));
    return line;
}

bool is_aligned16(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

bool is_aligned16(const ConstTensor4& tensor, DType dtype) {
    int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    return is_aligned16(tensor.data) && tensor.stride_batch * bytes % 16 == 0 &&
           tensor.stride_head * bytes % 16 == 0 && tensor.stride_seq * bytes % 16 == 0;
}

bool is_aligned16(const FarField& far, DType dtype) {
    auto rows_of = [](const BlockMeans& means) {
        return ConstTensor4{means.data, 0, means.stride_head, means.stride_block};
    };
    return is_aligned16(rows_of(far.key), dtype) && is_aligned16(rows_of(far.value), dtype) &&
           is_aligned16(far.sums) && is_aligned16(far.means);
}

bool is_boxed(const ConstTensor4& tensor, int64_t batch, int64_t heads, int64_t length) {
    return (batch <= 1 || tensor.stride_batch > 0) && (heads <= 1 || tensor.stride_head > 0) &&
           (length <= 1 || tensor.stride_seq > 0);
}

}  // namespace condensate
