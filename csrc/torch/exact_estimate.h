// The exact selector's omitted mass, from two log-sum-exps.
#pragma once

#include "torch/tensor_args.h"

namespace condensate::ops {

// lse over a support; `estimate` holds the lse over all visible keys and becomes
// 1 - exp(lse - lse_full), at least 0, and 0 for a row that sees no key.
void omitted_from_lse(const Tensor& lse, Tensor& estimate);

}  // namespace condensate::ops
