#include "torch/exact_estimate.h"

#include <array>
#include <limits>

#include <torch/csrc/stable/ops.h>

namespace condensate::ops {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

void check_call(AOTITorchError error) {
    if (error != TORCH_SUCCESS)
        throw std::runtime_error(
            "attention_forward: torch failed while computing the omitted mass");
}

void in_place(const char* name, Tensor& tensor) {
    std::array<StableIValue, 1> stack{from(tensor)};
    check_call(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);  // the call returns its argument: take the reference over
}

// -inf becomes the lowest finite float, so that two empty rows differ by 0 and not by NaN. A NaN
// stays, being the caller's.
Tensor finite_floor(const Tensor& lse) {
    std::array<StableIValue, 4> stack{
        from(lse), from(std::optional<double>(std::numeric_limits<double>::quiet_NaN())),
        from(std::optional<double>(std::numeric_limits<double>::infinity())),
        from(std::optional<double>(std::numeric_limits<float>::lowest()))};
    check_call(torch_call_dispatcher("aten::nan_to_num", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
}

}  // namespace

void omitted_from_lse(const Tensor& lse, Tensor& estimate) {
    Tensor difference = torch::stable::subtract(finite_floor(lse), finite_floor(estimate));
    in_place("aten::expm1_", difference);
    in_place("aten::neg_", difference);
    in_place("aten::relu_", difference);
    torch::stable::copy_(estimate, difference);
}

}  // namespace condensate::ops
