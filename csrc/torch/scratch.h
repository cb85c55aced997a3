// Several intermediate arrays in one allocation: an allocation per array would cost more host time
// than a small call's kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "torch/tensor_args.h"

namespace condensate::ops {

// Where arrays lie in memory that holds all of them.
class Layout {
  public:
    // Reserves `bytes` and returns their offset.
    int64_t reserve(int64_t bytes) {
        const int64_t offset = bytes_;
        bytes_ = ceil_div(offset + bytes, kAlignmentBytes) * kAlignmentBytes;
        return offset;
    }
    int64_t bytes() const { return bytes_; }

  private:
    static constexpr int64_t kAlignmentBytes = 256;
    int64_t bytes_ = 0;
};

class Scratch {
  public:
    // Reserves `bytes`; the offset is for pointer() once allocate() was called.
    int64_t reserve(int64_t bytes) { return layout_.reserve(bytes); }
    void allocate(const char* op, const Tensor& like) {
        if (layout_.bytes() > 0)
            storage_.emplace(ops::allocate(op, like, {layout_.bytes()}, ScalarType::Byte));
    }
    template <typename T>
    T* pointer(int64_t offset) const {
        if (!storage_.has_value()) return nullptr;
        return reinterpret_cast<T*>(static_cast<std::byte*>(storage_->mutable_data_ptr()) + offset);
    }

  private:
    Layout layout_;
    std::optional<Tensor> storage_;
};

}  // namespace condensate::ops
