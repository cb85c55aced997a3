// Names, the choice of a path, and the text of a plan.
#include "condensate/plan.h"

#include <cstdarg>
#include <cstdio>

#include "condensate/call.h"
#include "host/run_stage.h"

namespace condensate {
namespace {

thread_local Plan t_last_plan;

// What stands in for a forced path that a stage has no kernel for.
Path next_path(Path path) { return path == Path::kSm90 ? Path::kSm80 : Path::kSimt; }

const RouteState* find(const RouteState* routes, int count, Path path) {
    for (int i = 0; i < count; ++i)
        if (routes[i].path == path && routes[i].exists) return &routes[i];
    return nullptr;
}

Status take_forced(const RouteState* routes, int count, const DeviceFacts& facts, Path forced,
                   StagePlan* plan) {
    const char* obstacle =
        facts.cuda ? "the tensors are on a CUDA device" : "the tensors are on the CPU";
    if (runs_on_cuda(forced) == facts.cuda) {
        const RouteState* route = find(routes, count, forced);
        for (Path path = forced; !route && path != Path::kSimt;) {
            path = next_path(path);
            route = find(routes, count, path);
        }
        obstacle = route ? route->obstacle : "the stage has no such kernel";
        if (obstacle == nullptr) {
            plan->path = route->path;
            plan->reason = "forced by CONDENSATE_FORCE_PATH";
            return {};
        }
    }
    return make_status(StatusCode::kInvalidArgument,
                       "%s: CONDENSATE_FORCE_PATH is %s, which cannot run this call: %s; unset "
                       "it, or force %s.",
                       stage_name(plan->stage), path_name(forced), obstacle,
                       facts.cuda ? "simt" : "cpu or cpu_reference");
}

void append(std::string* text, const char* format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    *text += line;
}

using LL = long long;

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
        case Stage::kOmittedFromLse:
            return "omitted_from_lse";
        case Stage::kDecode:
            return "attention_with_kvcache";
        case Stage::kUpdateSummaries:
            return "update_kv_summaries";
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

Status choose_path(const RouteState* routes, int count, const DeviceFacts& facts,
                   const Environment& environment, StagePlan* plan) {
    if (environment.forced) return take_forced(routes, count, facts, environment.path, plan);
    const char* obstacle = nullptr;  // of the last better route
    for (int i = 0; i < count; ++i) {
        if (runs_on_cuda(routes[i].path) != facts.cuda || !routes[i].exists) continue;
        if (routes[i].obstacle) {
            obstacle = routes[i].obstacle;
            continue;
        }
        plan->path = routes[i].path;
        plan->reason = obstacle ? obstacle : routes[i].reason;
        return {};
    }
    return make_status(StatusCode::kUnsupported,
                       "%s: no path can run this call: %s; move the tensors to %s.",
                       stage_name(plan->stage), obstacle ? obstacle : "there is no kernel for it",
                       facts.cuda ? "the CPU" : "a CUDA device");
}

std::string to_string(const Plan& plan) {
    std::string text;
    append(&text,
           "selection=%s keys_per_query<=%lld list_width=%lld summary_rows=%lld far_pools=%lld "
           "tiles=%lld x %lld positions workspace=%lld bytes",
           selection_name(plan.selection), LL{plan.keys_per_query}, LL{plan.list_width},
           LL{plan.summary_rows}, LL{plan.far_pools}, LL{plan.tiles}, LL{plan.tile_positions},
           LL{plan.workspace_bytes});
    for (int i = 0; i < plan.num_stages; ++i) {
        const StagePlan& stage = plan.stages[i];
        append(&text, "\n  %s: path=%s (%s), %lld %s", stage_name(stage.stage),
               path_name(stage.path), stage.reason, LL{stage.work}, stage.unit);
    }
    return text;
}

void remember_plan(const Plan& plan) { t_last_plan = plan; }
const Plan& last_plan() { return t_last_plan; }

}  // namespace condensate
