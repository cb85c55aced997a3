// What a stage says of itself: one table of the ways to run it, beside its launchers in
// host/stages/. A plan reads what keeps each way from running, a call launches the one planned.
#pragma once

#include <cstdint>

#include "condensate/params.h"
#include "condensate/plan.h"
#include "host/device_info.h"
#include "host/launch.h"

namespace condensate {

// One way to run a stage.
template <class Params>
struct Route {
    Path path;
    const char* reason;  // to take it, where nothing faster was ruled out before
    // Parameters arrive validated. Null in builds without these kernels.
    Status (*run)(const Params& params, Launch& launch);
    // Null where it can run, else what keeps it; no function: it always can.
    const char* (*obstacle)(const Params& params, const DeviceFacts& facts) = nullptr;
    // Does the path have a kernel for this kind of call? Where not, forcing it takes the next path.
    bool (*exists)(const Params& params) = nullptr;
    int64_t (*workspace_bytes)(const Params& params, const DeviceFacts& facts) = nullptr;
};

struct Work {
    int64_t pieces;
    const char* unit;
};

template <class Params>
struct StageTable {
    static constexpr int kMaxRoutes = 5;

    Stage stage;
    Status (*validate)(const Params& params);
    bool (*writes_nothing)(const Params& params);
    Work (*work)(const Params& params);
    // Adds what the stage does to the plan of its call.
    void (*describe)(const Params& params, Plan* plan);
    // Can the contents of a caller's tensor be invalid, so that strict mode has to check them?
    bool (*reads_indices)(const Params& params);
    Route<Params> routes[kMaxRoutes];  // those of CUDA, then those of the CPU, the best first
    int num_routes;
    const void* (*workspace)(const Params& params) = nullptr;  // where a route needs some

    const Route<Params>* route(Path path) const {
        for (int i = 0; i < num_routes; ++i)
            if (routes[i].path == path) return &routes[i];
        return nullptr;
    }
};

// Every stage defines `const StageTable<Params>& table_of(const Params&)` for its parameters.

// For tables: the name of a launcher, or null in a build without it.
#if defined(CONDENSATE_WITH_CUDA)
template <auto kLauncher, class Params>
Status run_cuda(const Params& params, Launch& launch) {
    return kLauncher(params, launch.cuda);
}
#define CONDENSATE_CUDA_LAUNCHER(name) (run_cuda<&kernels::name>)
#define CONDENSATE_CUDA_FUNCTION(name) (name)
#else
#define CONDENSATE_CUDA_LAUNCHER(name) nullptr
#define CONDENSATE_CUDA_FUNCTION(name) nullptr
#endif
#if defined(CONDENSATE_WITH_SM90A)
#define CONDENSATE_SM90_LAUNCHER(name) CONDENSATE_CUDA_LAUNCHER(name)
#else
#define CONDENSATE_SM90_LAUNCHER(name) nullptr
#endif

// What every mma.sync path needs.
inline const char* mma_obstacle(DType dtype, bool aligned, const DeviceFacts& facts) {
    if (facts.sm_major < 8) return "compute capability below 8.0";
    if (dtype == DType::kFloat32) return "float32 has no mma path";
    return aligned ? nullptr : "a pointer or stride is not a multiple of 16 bytes";
}
// And every wgmma path beside that.
inline const char* wgmma_obstacle(const DeviceFacts& facts) {
    return facts.sm_major == 9 && facts.sm90a_kernels
               ? nullptr
               : "not compute capability 9.0, or a build without 90a";
}

constexpr char kOnlyKernel[] = "the stage's one CUDA kernel";
constexpr char kOnCpu[] = "tensors are on the CPU";
constexpr char kByMma[] = "half precision, aligned, sm >= 8.0";
constexpr char kByWgmma[] = "half precision, aligned, sm 9.0";

}  // namespace condensate
