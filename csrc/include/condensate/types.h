// Plain types that every layer shares. No torch, no CUDA headers, nothing that throws.
#pragma once

#include <cstdint>

#include "condensate/host_device.h"

namespace condensate {

enum class DType : int32_t {
    kFloat16 = 0,
    kBFloat16 = 1,
    kFloat32 = 2,
    kFloat8E4M3 = 3,  // of key/value caches alone
};

// How the keys outside anchors and window are chosen.
enum class Selector : int32_t {
    kBlock = 0,  // 64-key blocks by their 8-key means
    kQuest = 1,  // 64-key blocks by their 16-key min/max bounds
    kMean = 2,   // 64-key blocks by their mean key
    kExact = 3,  // single keys by their score, one set per query and head
};

enum class StatusCode : int32_t {
    kOk = 0,
    kInvalidArgument = 1,  // the caller's fault; the message names argument, value and fix
    kUnsupported = 2,      // right arguments that this build or device cannot run
    kCudaError = 3,        // the message holds cudaGetErrorString
};

// A result without exceptions. The message is only set when the code is not kOk.
struct Status {
    static constexpr int kMessageBytes = 512;
    StatusCode code = StatusCode::kOk;
    char message[kMessageBytes] = {};
    bool ok() const { return code == StatusCode::kOk; }
};

// Bits of the sticky error word that kernels set when tensor *contents* are invalid.
// The offending entry is skipped; nothing is read or written out of bounds.
enum ErrorBit : uint32_t {
    kErrorBlockIndex = 1u << 0,   // a listed block is negative, out of range or not ascending
    kErrorBlockCount = 1u << 1,   // a block count is negative or exceeds the list's width
    kErrorRowIndex = 1u << 2,     // a sampled query row is out of range
    kErrorCacheLength = 1u << 3,  // a sequence's length is negative or exceeds its pages
    kErrorBlockTable = 1u << 4,   // a page that a sequence needs is negative or out of range
    kErrorTokenIndex = 1u << 5,   // a listed token is negative, out of range or not ascending
};

// A [batch, heads, seq, head_dim] tensor. Strides are in elements; head_dim is contiguous.
struct ConstTensor4 {
    const void* data = nullptr;
    int64_t stride_batch = 0;
    int64_t stride_head = 0;
    int64_t stride_seq = 0;

    // Elements before a row.
    CONDENSATE_HOST_DEVICE int64_t offset(int64_t batch, int64_t head, int64_t seq) const {
        return batch * stride_batch + head * stride_head + seq * stride_seq;
    }
};

// Where to run. `stream` is a cudaStream_t and is ignored on the CPU.
// `parallel_for` splits [0, n) into ranges and calls body(context, begin, end) on each, on any
// threads; null runs serially. It is ignored on CUDA.
struct Executor {
    bool cuda = false;
    int device_index = 0;
    void* stream = nullptr;
    void (*parallel_for)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end),
                         void* context) = nullptr;
};

}  // namespace condensate
