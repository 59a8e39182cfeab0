// Which instruction set the vector kernels use: chosen once, at run time, by what processor and operating system support.
//
// A family's kernels are one source text, compiled once for each instruction set by each_isa.h and picked by VMAE2_PICK.
// Every set works on the same 16 lanes in the same order and without fused multiply-adds, so all give the same bits.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VMAE2_X86
#endif

namespace vmae2 {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// The instruction set in use: the widest supported one, unless set_cpu_isa chose another.
Isa cpu_isa();

// By name, for tests. Throws std::invalid_argument for a set this processor or build does not support.
void set_cpu_isa(const std::string& name);
std::string cpu_isa_name();

// Names of the supported sets, the narrowest first.
std::vector<std::string> supported_cpu_isas();

template <class Function>
Function by_isa(Function portable, Function avx2, Function avx512) {
  switch (cpu_isa()) {
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return portable;
  }
}

}  // namespace vmae2

// Pointer to the version of a kernel for the instruction set in use.
#ifdef VMAE2_X86
#define VMAE2_PICK(...) by_isa(&portable::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__)
#else
#define VMAE2_PICK(...) (&portable::__VA_ARGS__)
#endif
