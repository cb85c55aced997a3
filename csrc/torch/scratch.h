// Several intermediate arrays in one allocation: an allocation per array would cost more host time
// than a small call's kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "torch/tensor_args.h"

namespace condensate::ops {

class Scratch {
  public:
    // Reserves `bytes`; the offset is for pointer() once allocate() was called.
    int64_t reserve(int64_t bytes) {
        const int64_t offset = total_bytes_;
        total_bytes_ = ceil_div(offset + bytes, kAlignmentBytes) * kAlignmentBytes;
        return offset;
    }
    void allocate(const char* op, const Tensor& like) {
        if (total_bytes_ > 0)
            storage_.emplace(ops::allocate(op, like, {total_bytes_}, ScalarType::Byte));
    }
    template <typename T>
    T* pointer(int64_t offset) const {
        if (!storage_.has_value()) return nullptr;
        return reinterpret_cast<T*>(static_cast<std::byte*>(storage_->mutable_data_ptr()) + offset);
    }

  private:
    static constexpr int64_t kAlignmentBytes = 256;
    int64_t total_bytes_ = 0;
    std::optional<Tensor> storage_;
};

}  // namespace condensate::ops
