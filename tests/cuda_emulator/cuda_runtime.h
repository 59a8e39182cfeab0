// CUDA on a processor, as far as csrc/cuda needs it: the kernels' own sources, compiled by a C++ compiler with this folder
// first among the include paths, run on host memory. Blocks run one after another; the threads of a block are fibers that
// run until they meet a barrier or a warp's exchange (emulator.cpp). Odd blocks run their threads in falling order, so that
// a missing barrier gives a wrong result in one of the two. Stricter than a GPU where that finds mistakes: warp functions
// need all 32 lanes, a barrier needs all threads of the block, shared memory starts out as garbage.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// What a fiber waits for: every thread of the group must come to the same kind of meeting.
enum class Meeting { none, block_barrier, block_or, warp_barrier, shuffle, reduce };

// Hand in `value`, wait for the whole warp, and get what lane `from` handed in.
uint64_t exchange(unsigned mask, Meeting meeting, uint64_t value, int from);
// Hand in `value`, wait for the whole warp, and get the sum over all lanes.
uint64_t combine(unsigned mask, Meeting meeting, uint64_t value);
bool block_meeting(Meeting meeting, bool value);

unsigned char* shared_memory();

// 0, or the number of an error that message() explains.
int run(const dim3& grid, const dim3& block, size_t shared, const std::function<void()>& thread);
const char* message(int error);

}  // namespace emulator

inline void __syncthreads() { emulator::block_meeting(emulator::Meeting::block_barrier, false); }
inline int __syncthreads_or(int value) { return emulator::block_meeting(emulator::Meeting::block_or, value != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::combine(mask, emulator::Meeting::warp_barrier, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::exchange(mask, emulator::Meeting::shuffle, bits, static_cast<int>(threadIdx.x % 32) ^ lanes);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) <= 8);
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::exchange(mask, emulator::Meeting::shuffle, bits, lane < lanes ? lane : lane - lanes);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(emulator::combine(mask, emulator::Meeting::reduce, static_cast<uint64_t>(static_cast<int64_t>(value))));
}

// Fibers are never interrupted.
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The runtime: one device, no streams, launches that run at once.
using cudaStream_t = struct Stream*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return emulator::message(error); }

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Parameters... arguments) {
  return emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
}
