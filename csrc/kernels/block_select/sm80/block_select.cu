// Selection by mma.sync.
#include "kernels/block_select/sm80/by_mma.h"

namespace condensate::kernels {

using namespace block_select;

int64_t block_select_workspace_bytes(const BlockSelectParams& params, int sm_count) {
    return Workspace(params, sm_count).bytes;
}

Status block_select_sm80(const BlockSelectParams& params, const LaunchContext& context) {
    return select(params, context, [](const Call& call) {
        return call.params.problem.dtype == DType::kFloat16 ? by_mma<__half>(call)
                                                            : by_mma<__nv_bfloat16>(call);
    });
}

}  // namespace condensate::kernels
