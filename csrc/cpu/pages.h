// Memory that a kernel is about to fill.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vmae2 {

// Ask for huge pages behind a large output. Fresh memory comes from the kernel page by page as it is first written, and for
// small pages that costs several times the write itself; where the memory is in use already, nothing changes.
inline void expect_writes(void* out, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t huge = int64_t{1} << 21;
  if (bytes < huge) return;
  const auto begin = reinterpret_cast<uintptr_t>(out);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal is no error
#else
  (void)out, (void)bytes;
#endif
}

}  // namespace vmae2
