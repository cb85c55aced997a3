// attention() as a sequence of stages, written once: planning visits them, and so does running.
#pragma once

#include "condensate/call.h"
#include "host/device_info.h"
#include "host/environment.h"

namespace condensate {

// plan_attention() as a pure function, so that every choice can be tested without a device.
Status make_plan(const AttentionCall& call, const DeviceFacts& facts,
                 const Environment& environment, Plan* plan);

// Stage `index` of the plan alone, for benchmarks; those before it have run.
Status run_attention_stage(const AttentionCall& call, const Plan& plan, int index, void* workspace,
                           const Executor& executor);

}  // namespace condensate
