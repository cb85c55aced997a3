// float16, bfloat16 and e4m3 on the host, one element at a time, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "condensate/types.h"

namespace condensate {

inline int64_t dtype_bytes(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8E4M3 ? 1 : 2;
}

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float bfloat16_to_float(uint16_t half) { return float_from_bits(uint32_t{half} << 16); }

inline uint16_t float_to_bfloat16(float value) {
    uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float16_to_float(uint16_t half) {
    uint32_t sign = uint32_t{half & 0x8000u} << 16;
    uint32_t magnitude = uint32_t{half & 0x7fffu} << 13;
    if (magnitude >= 0x7c00u << 13)  // inf, NaN
        return float_from_bits(sign | magnitude | 0x7f800000u);
    if (magnitude >= 0x0400u << 13)  // normal: move the exponent bias from 15 to 127
        return float_from_bits(sign | (magnitude + (112u << 23)));
    // Subnormal: h * 2^-24, by putting h below the mantissa of 0.5 and subtracting 0.5.
    float value = float_from_bits(magnitude + (113u << 23)) - float_from_bits(113u << 23);
    return float_from_bits(sign | float_bits(value));
}

inline uint16_t float_to_float16(float value) {
    uint32_t bits = float_bits(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to inf
    if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the subnormals' last bit
        float rounded = float_from_bits(bits) + 0.5f;
        return static_cast<uint16_t>(sign | (float_bits(rounded) - 0x3f000000u));
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13));
}

// 4 bits of exponent with bias 7, 3 of mantissa; no infinity, all ones is NaN.
inline float e4m3_to_float(uint8_t byte) {
    const uint32_t sign = uint32_t{byte & 0x80u} << 24;
    const uint32_t magnitude = byte & 0x7fu;
    if (magnitude == 0x7fu) return float_from_bits(sign | 0x7fc00000u);
    if (magnitude >= 0x08u) return float_from_bits(sign | ((magnitude << 20) + (120u << 23)));
    // Subnormal: m * 2^-9, by putting m below the mantissa of 2^-6 and subtracting 2^-6.
    const float value =
        float_from_bits((magnitude << 20) + (121u << 23)) - float_from_bits(121u << 23);
    return float_from_bits(sign | float_bits(value));
}

inline float load_number(DType dtype, const void* data, int64_t index) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
    if (dtype == DType::kFloat8E4M3) return e4m3_to_float(static_cast<const uint8_t*>(data)[index]);
    uint16_t half = static_cast<const uint16_t*>(data)[index];
    return dtype == DType::kFloat16 ? float16_to_float(half) : bfloat16_to_float(half);
}

inline void store_number(DType dtype, void* data, int64_t index, float value) {
    if (dtype == DType::kFloat32)
        static_cast<float*>(data)[index] = value;
    else
        static_cast<uint16_t*>(data)[index] =
            dtype == DType::kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
}

inline float round_to(DType dtype, float value) {
    if (dtype == DType::kFloat16) return float16_to_float(float_to_float16(value));
    if (dtype == DType::kBFloat16) return bfloat16_to_float(float_to_bfloat16(value));
    return value;
}

}  // namespace condensate
