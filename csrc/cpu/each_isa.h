// Compiles one family of kernels for every instruction set. Define VMAE2_KERNELS as the header of the kernels, then include
// this file once, after everything the kernels use: what is included before stays code for any processor.
//
// A header of kernels has no include and no include guard; it stands inside an anonymous namespace of its own for each set,
// with the 16-lane vectors of lanes_<set>.h and lanes.h. It holds no lambda: clang's attribute would not reach it.
// VMAE2_BYTES is defined where the set can pick bytes by a table; picking them one by one is slower than a strided loop.
#include <cmath>

#include "isa.h"
#include "numeric.h"

#ifdef VMAE2_X86
#ifndef __clang__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the values GCC's AVX-512 intrinsics leave undefined on purpose
#endif
#include <immintrin.h>
#ifndef __clang__
#pragma GCC diagnostic pop
#endif
#endif

#define VMAE2_INLINE inline __attribute__((always_inline))

namespace vmae2 {
namespace {

namespace portable {
#include "lanes_portable.h"
#include "lanes.h"
#include VMAE2_KERNELS
}  // namespace portable

#ifdef VMAE2_X86
#define VMAE2_BYTES

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
namespace avx2 {
#include "lanes_avx2.h"
#include "lanes.h"
#include VMAE2_KERNELS
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
namespace avx512 {
#include "lanes_avx512.h"
#include "lanes.h"
#include VMAE2_KERNELS
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef VMAE2_BYTES
#endif  // VMAE2_X86

}  // namespace
}  // namespace vmae2

#undef VMAE2_KERNELS
