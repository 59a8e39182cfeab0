// Loops over several threads.
//
// The threads are OpenMP's: torch uses the same library (one copy is loaded for one soname), so a kernel runs on the very
// threads that torch's own operations just left spinning. Threads of our own would have to wait for these to let go of the
// cores, which costs more than most kernels take.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace vmae2 {

// Whether this process was forked from one that had loaded the extension. Its OpenMP threads stayed behind, and waiting for
// them would never end: all work stays in the calling thread.
bool forked();

// Call body(begin, end, worker) on slices of [0, count), worker in [0, max(1, threads)). `cost` is the work of one item in
// touched elements. The body must not throw, and its result must not depend on where slices are cut.
template <class Body>
void parallel_slices(int64_t count, int64_t cost, int threads, const Body& body) {
  constexpr int64_t elements_per_thread = 1 << 15;  // some 10 us; waking a thread that no longer spins costs as much
  const int64_t useful = std::max<int64_t>(1, count * std::max<int64_t>(1, cost) / elements_per_thread);
  const int64_t workers = std::min<int64_t>({useful, static_cast<int64_t>(std::max(1, threads)), std::max<int64_t>(1, count)});
#ifdef _OPENMP
  if (workers > 1 && !forked()) {
    // Several slices a worker, taken as they come: a thread that lost its processor to another program holds up one slice
    // only, and one that is not to be had holds up nothing.
    const int64_t slices = std::min(count, 8 * workers);
    std::atomic<int64_t> next{0};
    // All threads that torch has, or the library would end those left out and torch would start them anew.
#pragma omp parallel num_threads(threads)
    for (int64_t s = next++; s < slices; s = next++) {
      body(count * s / slices, count * (s + 1) / slices, static_cast<int64_t>(omp_get_thread_num()));
    }
    return;
  }
#endif
  (void)workers;
  body(int64_t{0}, count, int64_t{0});
}

// The same for a body(begin, end) that needs nothing of its own a worker.
template <class Body>
void parallel_for(int64_t count, int64_t cost, int threads, const Body& body) {
  parallel_slices(count, cost, threads, [&](int64_t begin, int64_t end, int64_t) { body(begin, end); });
}

}  // namespace vmae2
