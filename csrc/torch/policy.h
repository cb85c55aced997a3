// Checks of what selects the keys: the budget and the far field.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>

#include "host/validate.h"
#include "torch/tensor_args.h"

namespace condensate::ops {

// How many keys are selected: at most topk, by `topk_per_head` for each KV head, and by `top_p` no
// more than hold so much mass.
struct Budget {
    int64_t topk = 0;
    std::optional<Tensor> per_head;
    std::optional<double> top_p;
};

inline void check_budget(const char* op, const Budget& budget, Selector selector) {
    check_status(validate_topk(op, budget.topk, selector));
    if (budget.top_p) check_status(validate_top_p(op, *budget.top_p, "None"));
    if (selector != Selector::kExact || !(budget.top_p || budget.per_head)) return;
    const char* name = budget.top_p ? "top_p" : "topk_per_head";
    fail(op, std::string(name) +
                 " is given with selector=\"exact\", expected None there, as it cuts lists of "
                 "blocks and \"exact\" selects single keys; pass None, or selector=" +
                 block_selector_names() + ".");
}

// What a checked budget says about lists: the mass that they must hold (0: none is asked for), and
// the budgets of the KV heads (null: all the same).
inline float list_share(const Budget& budget) {
    // A share below what float32 tells from 0 still wants lists that are short.
    constexpr float kSmallest = std::numeric_limits<float>::min();
    return budget.top_p ? std::max(static_cast<float>(*budget.top_p), kSmallest) : 0.0f;
}
inline const int32_t* head_budgets(const Budget& budget, const Argument& query, int64_t kv_heads) {
    if (!budget.per_head) return nullptr;
    const Argument per_head{query.op, "topk_per_head", *budget.per_head};
    check_contiguous(per_head, ScalarType::Int, query, {kv_heads});
    return static_cast<const int32_t*>(per_head.tensor.const_data_ptr());
}

// Condense what the lists leave out? By default where there are lists.
inline bool resolve_far_field(const char* op, const std::optional<bool>& far_field,
                              Selector selector) {
    const bool lists_blocks = selector != Selector::kExact;
    if (far_field.value_or(false) && !lists_blocks)
        fail(op,
             "far_field is True with selector=\"exact\", expected None or False there, as the "
             "far field condenses blocks and \"exact\" selects single keys; pass "
             "far_field=None, or selector=" +
                 block_selector_names() + ".");
    return far_field.value_or(lists_blocks);
}

}  // namespace condensate::ops
