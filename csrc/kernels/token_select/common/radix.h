// Radix selection of the k-th largest float of a row by 8-bit digits of order-preserving keys.
// One warp searches the histogram of one row at a time.
#pragma once

#include <cstdint>

namespace condensate::kernels {

constexpr int kRadixBits = 8;
constexpr int kRadixBins = 1 << kRadixBits;
constexpr int kRadixPasses = 32 / kRadixBits;
constexpr int kHistogramStride = kRadixBins + 1;  // equal bins of neighbouring rows: other banks

// Larger floats have larger keys; -0 and +0 are one key. NaN has to be kept out by the caller.
__device__ __forceinline__ uint32_t ordered_key(float x) {
    uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));  // -0 + 0 = +0
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float from_ordered_key(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// What is known of the k-th largest candidate of a row.
struct RadixRow {
    uint32_t prefix;     // its leading digits, or kNoPrefix
    uint32_t remaining;  // how many of the candidates that share the prefix are selected
    uint32_t equal;      // how many candidates share the prefix
};
// No shifted key equals it: the row takes no part in later passes.
constexpr uint32_t kNoPrefix = 0xffffffffu;

// Does a key belong to the row's prefix before digit `pass`, and which digit has it there?
__device__ __forceinline__ bool shares_prefix(uint32_t key, uint32_t prefix, int pass) {
    return pass == 0 || key >> (32 - kRadixBits * pass) == prefix;
}
__device__ __forceinline__ uint32_t radix_digit(uint32_t key, int pass) {
    return key >> (32 - kRadixBits * (pass + 1)) & (kRadixBins - 1);
}

// Narrows the row by one digit and clears the histogram for the next pass. The whole warp calls it,
// with the warp's view of the histogram complete; every lane returns the same row. In pass 0 a row
// with fewer than `remaining` candidates drops out; `row.remaining` is at least 1.
__device__ __forceinline__ RadixRow narrow_row(RadixRow row, uint32_t* histogram_smem, int pass) {
    constexpr int kLaneBins = kRadixBins / 32;
    int lane = static_cast<int>(threadIdx.x) % 32;
    // Lane 0 holds the largest bins, and bin[0] is the largest of a lane.
    uint32_t bin[kLaneBins];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) {
        uint32_t* slot = histogram_smem + kRadixBins - 1 - (lane * kLaneBins + i);
        bin[i] = *slot;
        *slot = 0;
        sum += bin[i];
    }
    uint32_t through = sum;  // candidates of this lane's bins and all larger ones
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, through, offset);
        if (lane >= offset) through += other;
    }
    uint32_t reached = __ballot_sync(0xffffffffu, through >= row.remaining);
    if (row.prefix == kNoPrefix || reached == 0) return {kNoPrefix, row.remaining, 0};

    int owner = __ffs(static_cast<int>(reached)) - 1;
    uint32_t above = through - sum, digit = 0, equal = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) {
        if (!found && above + bin[i] >= row.remaining) {
            found = true;
            digit = static_cast<uint32_t>(kRadixBins - 1 - (lane * kLaneBins + i));
            equal = bin[i];
        }
        if (!found) above += bin[i];
    }
    digit = __shfl_sync(0xffffffffu, digit, owner);
    equal = __shfl_sync(0xffffffffu, equal, owner);
    above = __shfl_sync(0xffffffffu, above, owner);
    uint32_t leading = pass == 0 ? 0u : row.prefix << kRadixBits;
    return {leading | digit, row.remaining - above, equal};
}

}  // namespace condensate::kernels
