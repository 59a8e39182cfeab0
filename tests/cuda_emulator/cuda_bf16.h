// bfloat16 as csrc/cuda uses it; conversions are those of the C++ kernels.
#pragma once

#include "../../csrc/cpu/numeric.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return vmae2::load(vmae2::bf16{value.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  vmae2::bf16 out;
  vmae2::store(out, value);
  return {out.bits};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
