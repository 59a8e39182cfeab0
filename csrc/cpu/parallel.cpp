// See parallel.h.
#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace vmae2 {
namespace {

bool in_child = false;

[[maybe_unused]] const bool watched = [] {
#if defined(__unix__) || defined(__APPLE__)
  return pthread_atfork(nullptr, nullptr, [] { in_child = true; }) == 0;
#else
  return false;  // nothing forks here
#endif
}();

}  // namespace

bool forked() { return in_child; }

}  // namespace vmae2
