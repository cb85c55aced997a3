// What the bindings need beside the public API: the plan of a call, and which path ran last.
#pragma once

#include "condensate/condensate.h"
#include "host/plan.h"

namespace condensate {

// The plan that a call with these shapes follows on this executor, workspace included.
Status plan_call(const PlanRequest& request, const Executor& executor, Plan* plan);

// The plan of this thread's last call that was started, so that a test can prove what ran.
const Plan& last_plan();

}  // namespace condensate
