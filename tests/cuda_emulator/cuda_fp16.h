// float16 as csrc/cuda uses it; conversions are those of the C++ kernels.
#pragma once

#include "../../csrc/cpu/numeric.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return vmae2::load(vmae2::f16{value.bits}); }
inline __half __float2half_rn(float value) {
  vmae2::f16 out;
  vmae2::store(out, value);
  return {out.bits};
}
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
