// Checks of what selects the keys: the budget, the far field, and what has no kernels yet.
#pragma once

#include <optional>
#include <string>

#include "host/validate.h"
#include "torch/tensor_args.h"

namespace condensate::ops {

inline void check_available(const char* op, const std::optional<double>& top_p) {
    if (top_p.has_value())
        fail(op, "top_p is " + std::to_string(*top_p) +
                     ", but a mass threshold is not yet available; pass top_p=None and set the "
                     "budget with topk.");
}

// Condense what the lists leave out? By default where there are lists.
inline bool resolve_far_field(const char* op, const std::optional<bool>& far_field,
                              Selector selector) {
    const bool lists_blocks = selector != Selector::kExact;
    if (far_field.value_or(false) && !lists_blocks)
        fail(op,
             "far_field is True with selector=\"exact\", expected None or False there, as the far "
             "field condenses blocks and \"exact\" selects single keys; pass far_field=None, or "
             "selector=\"block\", \"quest\" or \"mean\".");
    return far_field.value_or(lists_blocks);
}

inline void check_budget(const char* op, int64_t topk, Selector selector) {
    const Status status = validate_budget(topk, selector);
    if (!status.ok()) fail(op, status.message);
}

}  // namespace condensate::ops
