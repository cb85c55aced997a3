#include "host/environment.h"

#include <cstdlib>
#include <cstring>

#include "host/status.h"

namespace condensate {

Status read_environment(Environment* environment) {
    *environment = {};
    const char* strict = std::getenv("CONDENSATE_STRICT");
    environment->strict = strict != nullptr && std::strcmp(strict, "1") == 0;
    const char* forced = std::getenv("CONDENSATE_FORCE_PATH");
    if (forced == nullptr || forced[0] == '\0') return {};
    for (Path path : kPaths) {
        if (std::strcmp(forced, path_name(path)) != 0) continue;
        environment->forced = true;
        environment->path = path;
        return {};
    }
    return make_status(StatusCode::kInvalidArgument,
                       "CONDENSATE_FORCE_PATH is \"%.64s\", expected cpu_reference, cpu, sm80, "
                       "simt or sm90; unset it to let the plan choose.",
                       forced);
}

}  // namespace condensate
