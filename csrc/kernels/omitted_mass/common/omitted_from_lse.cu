// The omitted mass of rows whose two log-sum-exps are known.
#include "kernels/launch.h"
#include "kernels/omitted_mass/common/omitted.h"

namespace condensate::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) omitted_from_lse_kernel(OmittedFromLseParams params) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row < params.rows)
        params.omitted[row] = omitted_from_lse(params.lse[row], params.lse_full[row]);
}

}  // namespace

Status omitted_from_lse(const OmittedFromLseParams& params, const LaunchContext& context) {
    return launch(omitted_from_lse_kernel, "omitted_from_lse", {ceil_div(params.rows, kThreads)},
                  kThreads, 0, context, params);
}

}  // namespace condensate::kernels
