// Loops over several threads.
//
// Threads are started per call and joined before it returns. A resident pool (OpenMP's, for instance) would spin beside
// torch's own pool and not survive a fork; starting a thread costs some 20 us, so small work stays in the caller.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace vmae2 {

// Call body(begin, end) on slices of [0, count). `cost` is the work of one item in touched elements. The body must not
// throw, and its result must not depend on where slices are cut.
template <class Body>
void parallel_for(int64_t count, int64_t cost, int threads, const Body& body) {
  constexpr int64_t elements_per_thread = 1 << 17;
  const int64_t useful = std::max<int64_t>(1, count * std::max<int64_t>(1, cost) / elements_per_thread);
  const int64_t workers = std::min<int64_t>({useful, static_cast<int64_t>(std::max(1, threads)), std::max<int64_t>(1, count)});
  const auto slice = [&](int64_t worker) { body(count * worker / workers, count * (worker + 1) / workers); };
  std::vector<std::thread> started;
  started.reserve(static_cast<size_t>(workers - 1));
  int64_t next = 1;
  try {
    for (; next < workers; ++next) started.emplace_back(slice, next);
  } catch (const std::system_error&) {
    // No more threads to be had: the caller does the rest itself.
  }
  slice(0);
  for (; next < workers; ++next) slice(next);
  for (std::thread& thread : started) thread.join();
}

}  // namespace vmae2
