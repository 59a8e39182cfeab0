// Loops over several threads.
//
// Threads are started per call and joined before it returns. A resident pool (OpenMP's, for instance) would spin beside
// torch's own pool and not survive a fork. Starting a thread costs some 20 us where a core is free, but torch's idle threads spin
// for milliseconds after each of its operations and hold the cores for so long: work of a few milliseconds stays in the caller.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace vmae2 {

// Call body(begin, end, worker) on slices of [0, count), worker in [0, max(1, threads)). `cost` is the work of one item in
// touched elements. The body must not throw, and its result must not depend on where slices are cut.
template <class Body>
void parallel_slices(int64_t count, int64_t cost, int threads, const Body& body) {
  constexpr int64_t elements_per_thread = 1 << 20;
  const int64_t useful = std::max<int64_t>(1, count * std::max<int64_t>(1, cost) / elements_per_thread);
  const int64_t workers = std::min<int64_t>({useful, static_cast<int64_t>(std::max(1, threads)), std::max<int64_t>(1, count)});
  if (workers == 1) return body(int64_t{0}, count, int64_t{0});
  // Several slices a worker, taken as they come: the caller works while threads start, and a thread that lost its
  // processor to another program holds up one slice only.
  const int64_t slices = std::min(count, 8 * workers);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    for (int64_t s = next++; s < slices; s = next++) body(count * s / slices, count * (s + 1) / slices, worker);
  };
  std::vector<std::thread> started;
  started.reserve(static_cast<size_t>(workers - 1));
  try {
    for (int64_t worker = 1; worker < workers; ++worker) started.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, the caller among them, do it all.
  }
  work(0);
  for (std::thread& thread : started) thread.join();
}

// The same for a body(begin, end) that needs nothing of its own a worker.
template <class Body>
void parallel_for(int64_t count, int64_t cost, int threads, const Body& body) {
  parallel_slices(count, cost, threads, [&](int64_t begin, int64_t end, int64_t) { body(begin, end); });
}

}  // namespace vmae2
