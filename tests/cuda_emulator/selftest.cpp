// What the emulator and the launcher of csrc/cuda must notice or get right; prints one line a case. Built and read by tests/ops/test_cuda_kernels.py.
#include <cstdio>

#include "../../csrc/cuda/launch.cuh"

namespace {

void say(const char* name, cudaError_t status) { std::printf("%s: %s\n", name, status ? cudaGetErrorString(status) : "ok"); }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, Arguments... arguments) {
  const cudaLaunchConfig_t config{dim3(blocks), dim3(64), 256, nullptr};
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

__global__ void some_threads_at_the_barrier() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void lanes_at_different_functions() {
  if (threadIdx.x % 2) __syncwarp();
  else __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void part_of_a_warp() { __shfl_xor_sync(0xffffu, 1, 1); }

// Each thread reads its neighbour's value, with or without waiting for it to be written.
__global__ void neighbours(bool wait, int* wrong) {
  auto* shared = reinterpret_cast<int*>(emulator::shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (wait) __syncthreads();
  const unsigned other = threadIdx.x ^ 1;
  *wrong += shared[other] != static_cast<int>(other);
}

__global__ void warp_functions(int* wrong) {
  const int lane = threadIdx.x % 32;
  for (int round = 1; round < 4; ++round) {
    *wrong += __shfl_xor_sync(0xffffffffu, lane * 1.5 * round, 5) != (lane ^ 5) * 1.5 * round;
    *wrong += __shfl_up_sync(0xffffffffu, lane * round, 3) != (lane < 3 ? lane : lane - 3) * round;
    *wrong += __reduce_add_sync(0xffffffffu, lane * round - 20) != 31 * 16 * round - 640;
    *wrong += __syncthreads_or(threadIdx.x == 63 && round == 2) != (round == 2);
  }
}

}  // namespace

int main() {
  int racing = 0, waiting = 0, wrong = 0;
  say("some_threads_at_the_barrier", launch(some_threads_at_the_barrier, 1));
  say("lanes_at_different_functions", launch(lanes_at_different_functions, 1));
  say("part_of_a_warp", launch(part_of_a_warp, 1));
  launch(neighbours, 2, false, &racing);
  say("with a barrier", launch(neighbours, 2, true, &waiting));
  say("warp_functions", launch(warp_functions, 2, &wrong));
  for (size_t shared : {vmae2::cuda::kSharedBytes, vmae2::cuda::kSharedBytes + 1}) {
    try {
      vmae2::cuda::launch("shared memory", vmae2::Queue{0, 0}, warp_functions, 1, 64, shared, &wrong);
      say("shared memory", cudaSuccess);
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
    }
  }
  std::printf("racing %d, waiting %d, wrong %d\n", racing, waiting, wrong);
}
