// Checks of what selects the keys: the budget, and options whose kernels do not exist yet.
#pragma once

#include <optional>
#include <string>

#include "host/validate.h"
#include "torch/tensor_args.h"

namespace condensate::ops {

inline void check_available(const char* op, const std::optional<double>& top_p, bool far_field) {
    if (top_p.has_value())
        fail(op, "top_p is " + std::to_string(*top_p) +
                     ", but a mass threshold is not yet available; pass top_p=None and set the "
                     "budget with topk.");
    if (far_field)
        fail(op,
             "far_field is True, but the pooled far field is not yet available; pass "
             "far_field=False.");
}

inline void check_budget(const char* op, int64_t topk, Selector selector) {
    const Status status = validate_budget(topk, selector);
    if (!status.ok()) fail(op, status.message);
}

}  // namespace condensate::ops
