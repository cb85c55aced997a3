// Where the keys or values of one KV head lie.
#pragma once

#include <cstdint>

#include "condensate/types.h"

namespace condensate {

// Rows of head_dim elements, one a key. Nothing else adds a stride to an address of a key or value,
// so that pages of a cache are this file's matter.
struct KvView {
    const void* first;  // row 0
    int64_t stride;     // elements, from a row to the next

    CONDENSATE_HOST_DEVICE static KvView of(const ConstTensor4& tensor, int element_bytes,
                                            int64_t batch, int64_t kv_head) {
        return {static_cast<const char*>(tensor.data) +
                    tensor.offset(batch, kv_head, 0) * element_bytes,
                tensor.stride_seq};
    }

    CONDENSATE_HOST_DEVICE const void* row(int64_t key, int element_bytes) const {
        return static_cast<const char*>(first) + key * stride * element_bytes;
    }
    template <class T>
    CONDENSATE_HOST_DEVICE const T* row(int64_t key) const {
        return static_cast<const T*>(row(key, sizeof(T)));
    }
};

}  // namespace condensate
