// bfloat16 and float16 as storage types; arithmetic is float. Conversions round to nearest, ties to even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

namespace vmae2 {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(uint8_t value) { return static_cast<float>(value); }
inline float load(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float load(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Exponent and mantissa at float's place, then one multiplication by 2^112 rebiases normal and subnormal numbers alike.
  const float finite = float_of(magnitude << 13) * float_of(0x77800000u);
  const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;  // a NaN is made quiet, as processors do
  const float result = magnitude >= 0x7c00u ? float_of(0x7f800000u | quiet | (magnitude << 13)) : finite;
  return float_of(bits_of(result) | sign);
}

inline void store(float& out, float value) { out = value; }

inline void store(bf16& out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store(f16& out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts float's last bit at 2^-24, the step of float16's subnormals, and rounds.
    result = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(result | sign);
}

}  // namespace vmae2
