#include "isa.h"

#include <atomic>
#include <stdexcept>

#ifdef VMAE2_X86
#include <cpuid.h>
#endif

namespace vmae2 {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa widest() {
#ifdef VMAE2_X86
  __builtin_cpu_init();
  unsigned a, b, c, d;
  // Not every compiler's __builtin_cpu_supports knows f16c.
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2")) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : Isa::avx2;
#else
  return Isa::portable;
#endif
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{widest()};
  return isa;
}

}  // namespace

Isa cpu_isa() { return current().load(std::memory_order_relaxed); }

std::string cpu_isa_name() { return kNames[static_cast<int>(cpu_isa())]; }

std::vector<std::string> supported_cpu_isas() { return {kNames, kNames + static_cast<int>(widest()) + 1}; }

void set_cpu_isa(const std::string& name) {
  const auto supported = supported_cpu_isas();
  std::string listed;
  for (size_t i = 0; i < supported.size(); ++i) {
    if (supported[i] == name) return current().store(static_cast<Isa>(i), std::memory_order_relaxed);
    listed += (i ? ", " : "") + supported[i];
  }
  throw std::invalid_argument("set_cpu_isa: " + name + " is not supported here; supported: " + listed);
}

}  // namespace vmae2
