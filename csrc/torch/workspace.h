// The workspace of a call: one allocation, as an allocation an array would cost more host time
// than a small call's kernels.
#pragma once

#include <optional>

#include "torch/tensor_args.h"

namespace condensate::ops {

class Workspace {
  public:
    // On the device of `like`; none for 0 bytes.
    Workspace(const char* op, const Tensor& like, int64_t bytes) {
        if (bytes > 0) storage_.emplace(allocate(op, like, {bytes}, ScalarType::Byte));
    }
    void* data() const { return storage_ ? storage_->mutable_data_ptr() : nullptr; }

  private:
    std::optional<Tensor> storage_;
};

}  // namespace condensate::ops
