// One launch of a stage: makes its device current and gathers what launchers are told beside the
// parameters; afterwards the errors of tensor contents.
#pragma once

#include <cstdint>
#include <optional>

#include "condensate/plan.h"
#include "condensate/types.h"
#include "host/device_info.h"
#include "host/environment.h"

#if defined(CONDENSATE_WITH_CUDA)
#include "kernels/launchers.h"
#endif

namespace condensate {

// Where a call runs and what its environment asks for, found out once a call.
struct Context {
    Executor executor;
    DeviceFacts facts;
    Environment environment;
};
Status make_context(const Executor& executor, Context* context);

// Where the executor runs, in its order.
Status fill_with_zero(void* data, int64_t bytes, const Executor& executor);

class Launch {
  public:
    explicit Launch(const Context& context) : executor(context.executor), context_(context) {}

    Status prepare();
    // `reads_indices`: in strict mode, invalid contents of tensors are an error of this stage.
    Status finish(Stage stage, bool reads_indices);

    const Executor& executor;
    uint32_t errors = 0;  // ErrorBit, from CPU kernels
#if defined(CONDENSATE_WITH_CUDA)
    kernels::LaunchContext cuda;
#endif

  private:
    const Context& context_;
    std::optional<DeviceGuard> guard_;
};

}  // namespace condensate
