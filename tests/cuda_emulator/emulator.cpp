// The scheduler behind cuda_runtime.h: one fiber a thread, switched where a thread has to wait for others.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr int kFailed = 999, kWrongDevice = 101;

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStack]};
  Meeting waits = Meeting::none;
  bool finished = false;
  uint64_t given = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
};

struct Warp {
  uint64_t seen[kWarp];  // what the lanes handed in at the last complete meeting
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  bool any = false;
  unsigned running = 0;
  ucontext_t scheduler{};
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  const std::function<void()>* thread = nullptr;
  std::string error;
};

thread_local Block* block = nullptr;
thread_local std::string failure;

void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}

void finish_switch([[maybe_unused]] void* save, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(save, stack, size);
#endif
}

void to_scheduler() {
  Fiber& fiber = block->fibers[block->running];
  start_switch(fiber.finished ? nullptr : &fiber.fake_stack, block->scheduler_stack, block->scheduler_size);
  swapcontext(&fiber.context, &block->scheduler);
  finish_switch(fiber.fake_stack, &block->scheduler_stack, &block->scheduler_size);
}

void fiber_main() {
  finish_switch(nullptr, &block->scheduler_stack, &block->scheduler_size);
  try {
    (*block->thread)();
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  block->fibers[block->running].finished = true;
  to_scheduler();
}

void prepare(Fiber& fiber) {
  fiber.finished = false;
  fiber.waits = Meeting::none;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void resume(unsigned number) {
  Fiber& fiber = block->fibers[number];
  block->running = number;
  threadIdx = dim3(number, 0, 0);
  start_switch(&block->fake_stack, fiber.stack.get(), kStack);
  swapcontext(&block->scheduler, &fiber.context);
  finish_switch(block->fake_stack, nullptr, nullptr);
}

const char* name(Meeting meeting) {
  switch (meeting) {
    case Meeting::none: return "nothing";
    case Meeting::block_barrier: return "__syncthreads";
    case Meeting::block_or: return "__syncthreads_or";
    case Meeting::warp_barrier: return "__syncwarp";
    case Meeting::shuffle: return "a shuffle";
    case Meeting::reduce: return "a reduction";
  }
  return "";
}

// Everyone waits and no meeting is complete: what for, and who is missing.
std::string deadlock() {
  std::string text = "deadlock in block " + std::to_string(blockIdx.x) + ":";
  std::string before;
  for (size_t i = 0; i < block->fibers.size(); ++i) {
    const Fiber& fiber = block->fibers[i];
    const std::string state = fiber.finished ? "has ended" : std::string("waits at ") + name(fiber.waits);
    if (state != before) text += " thread " + std::to_string(i) + " " + state + ";";
    before = state;
  }
  return text;
}

// Wait until the meeting is over. The scheduler clears `waits`.
void meet(Meeting meeting, uint64_t value) {
  Fiber& fiber = block->fibers[block->running];
  fiber.waits = meeting;
  fiber.given = value;
  to_scheduler();
}

// If all of these threads stand at the same kind of meeting: let them go on.
bool conclude(size_t begin, size_t end, bool of_block) {
  const Meeting meeting = block->fibers[begin].waits;
  const bool block_kind = meeting == Meeting::block_barrier || meeting == Meeting::block_or;
  if (meeting == Meeting::none || block_kind != of_block) return false;
  for (size_t i = begin; i < end; ++i) {
    if (block->fibers[i].waits != meeting) return false;
  }
  if (of_block) block->any = false;
  for (size_t i = begin; i < end; ++i) {
    Fiber& fiber = block->fibers[i];
    if (of_block) {
      block->any |= fiber.given != 0;
    } else {
      block->warps[i / kWarp].seen[i % kWarp] = fiber.given;
    }
    fiber.waits = Meeting::none;
  }
  return true;
}

// Run the block's threads to their end, or until one fails or all wait; says whether they came to it.
bool run_block(bool falling) {
  const size_t count = block->fibers.size();
  for (;;) {
    bool left = false, moved = false;
    for (size_t k = 0; k < count; ++k) {
      const size_t i = falling ? count - 1 - k : k;
      if (block->fibers[i].finished) continue;
      left = true;
      if (block->fibers[i].waits != Meeting::none) continue;
      resume(static_cast<unsigned>(i));
      if (!block->error.empty()) return false;
      moved = true;
    }
    if (!left) return true;
    for (size_t w = 0; w < count; w += kWarp) moved |= conclude(w, w + kWarp, false);
    moved |= conclude(0, count, true);
    if (!moved) {
      block->error = deadlock();
      return false;
    }
  }
}

}  // namespace

uint64_t exchange(unsigned mask, Meeting meeting, uint64_t value, int from) {
  combine(mask, meeting, value);
  return block->warps[block->running / kWarp].seen[from];
}

uint64_t combine(unsigned mask, Meeting meeting, uint64_t value) {
  if (mask != 0xffffffffu) throw std::logic_error("the emulator knows warp functions of all 32 lanes only");
  meet(meeting, value);
  uint64_t result = 0;
  const Warp& warp = block->warps[block->running / kWarp];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    result += warp.seen[lane];
  }
  return result;
}

bool block_meeting(Meeting meeting, bool value) {
  meet(meeting, value);
  return block->any;
}

unsigned char* shared_memory() { return block->shared.get(); }

int run(const dim3& grid, const dim3& threads, size_t shared, const std::function<void()>& thread) {
  if (threads.x == 0 || threads.x > 1024 || threads.x % kWarp || threads.y * threads.z * grid.y * grid.z != 1 || shared > 48 << 10) {
    failure = "the emulator takes one-dimensional grids of whole warps, up to 1024 threads and 48 KiB of shared memory";
    return kFailed;
  }
  Block state;
  state.fibers.resize(threads.x);
  state.warps.resize(threads.x / kWarp);
  state.thread = &thread;
  block = &state;
  blockDim = threads;
  gridDim = grid;
  bool done = true;
  for (unsigned b = 0; done && b < grid.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    // A block of its own size: an access outside it is seen by AddressSanitizer.
    state.shared.reset(new unsigned char[shared]);
    std::memset(state.shared.get(), 0xff, shared);
    for (Fiber& fiber : state.fibers) prepare(fiber);
    done = run_block(b % 2);
  }
  block = nullptr;
  failure = state.error;
  return done ? 0 : kFailed;
}

const char* message(int error) { return error == kWrongDevice ? "invalid device ordinal" : failure.c_str(); }

}  // namespace emulator
