// What the environment asks of a call. Nothing else in the host code reads it.
#pragma once

#include "condensate/plan.h"
#include "condensate/types.h"

namespace condensate {

struct Environment {
    bool forced = false;  // CONDENSATE_FORCE_PATH names a path
    Path path = Path::kCpu;
    bool strict = false;  // CONDENSATE_STRICT=1: invalid tensor contents are an error
};

// Fails when CONDENSATE_FORCE_PATH is no path's name.
Status read_environment(Environment* environment);

}  // namespace condensate
