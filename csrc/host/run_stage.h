// Plans and runs one stage by its table.
#pragma once

#include <exception>

#include "host/stage.h"
#include "host/status.h"

namespace condensate {

inline bool runs_on_cuda(Path path) { return path != Path::kCpuReference && path != Path::kCpu; }

// A route as one call sees it.
struct RouteState {
    Path path;
    const char* reason;
    const char* obstacle;  // null: it can run
    bool exists;
};

// Takes the best of `count` routes, or the one that the environment forces.
Status choose_path(const RouteState* routes, int count, const DeviceFacts& facts,
                   const Environment& environment, StagePlan* plan);

// The plan that last_plan() returns.
void remember_plan(const Plan& plan);

// Ranges beyond every key mean the same as ranges up to it, and keep the kernels' sums small.
inline void clamp_ranges(Problem* problem) {
    problem->window = min_i64(problem->window, problem->full_window());
    problem->anchors = min_i64(problem->anchors, problem->kv_len);
}
template <class Params>
auto clamp_ranges_of(Params* params, int) -> decltype(clamp_ranges(&params->problem)) {
    clamp_ranges(&params->problem);
}
template <class Params>
void clamp_ranges_of(Params*, long) {}  // a stage without ranges

template <class Params>
RouteState state_of(const Route<Params>& route, const Params& params, const DeviceFacts& facts) {
    const bool exists = route.exists == nullptr || route.exists(params);
    const char* obstacle = route.obstacle ? route.obstacle(params, facts) : nullptr;
    return {route.path, route.reason, obstacle, exists};
}

// Appends the stage to the plan of its call. Parameters are valid; only sizes, strides and
// alignment count.
template <class Params>
Status plan_stage(const Params& params, const DeviceFacts& facts, const Environment& environment,
                  Plan* plan) {
    const StageTable<Params>& table = table_of(params);
    RouteState routes[StageTable<Params>::kMaxRoutes];
    for (int i = 0; i < table.num_routes; ++i) routes[i] = state_of(table.routes[i], params, facts);
    StagePlan stage;
    stage.stage = table.stage;
    Status status = choose_path(routes, table.num_routes, facts, environment, &stage);
    if (!status.ok()) return status;
    const Work work = table.work(params);
    stage.work = work.pieces;
    stage.unit = work.unit;
    const Route<Params>& route = *table.route(stage.path);
    if (route.workspace_bytes) stage.workspace_bytes = route.workspace_bytes(params, facts);
    plan->stages[plan->num_stages++] = stage;
    table.describe(params, plan);
    return {};
}

// Runs a stage on the path that was planned for it, which must still fit the parameters.
template <class Params>
Status run_stage(const Params& params, const StagePlan& plan, const Context& context) {
    const StageTable<Params>& table = table_of(params);
    if (table.writes_nothing(params)) return {};
    const Route<Params>* route = table.route(plan.path);
    const char* obstacle = "it is one of another kind of device";
    if (route && runs_on_cuda(plan.path) == context.facts.cuda)
        obstacle = state_of(*route, params, context.facts).obstacle;
    if (obstacle != nullptr)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: the plan's path is %s, which cannot run this call: %s; plan it "
                           "with the tensors that it runs with.",
                           stage_name(plan.stage), path_name(plan.path), obstacle);
    if (plan.workspace_bytes > 0 && table.workspace(params) == nullptr)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: workspace is null, expected a pointer to %lld bytes; allocate "
                           "them on the tensors' device.",
                           stage_name(plan.stage), static_cast<long long>(plan.workspace_bytes));
    Launch launch(context);
    Status status = launch.prepare();
    if (!status.ok()) return status;
    try {
        status = route->run(params, launch);
    } catch (const std::exception& error) {  // the CPU kernels' memory
        return make_status(StatusCode::kUnsupported, "%s: the host has no memory left: %s.",
                           stage_name(plan.stage), error.what());
    }
    if (!status.ok()) return status;
    return launch.finish(plan.stage, table.reads_indices && table.reads_indices(params));
}

// The plan of a stage that is called by itself.
template <class Params>
Status plan_alone(const Params& params, const DeviceFacts& facts, const Environment& environment,
                  Plan* plan) {
    *plan = {};
    Status status = plan_stage(params, facts, environment, plan);
    plan->workspace_bytes = plan->stages[0].workspace_bytes;
    return status;
}

// A stage by itself: checks, plans, runs.
template <class Params>
Status run_alone(Params params, const Executor& executor) {
    Status status = table_of(params).validate(params);
    if (!status.ok()) return status;
    clamp_ranges_of(&params, 0);
    Context context;
    status = make_context(executor, &context);
    Plan plan;
    if (status.ok()) status = plan_alone(params, context.facts, context.environment, &plan);
    if (!status.ok()) return status;
    remember_plan(plan);
    return run_stage(params, plan.stages[0], context);
}

}  // namespace condensate
