// What the CUDA kernels share: launching on a given device and stream, storage types, vectors of 16 bytes, reductions.
//
// Launchers check arguments on the host and never wait: nothing here copies, allocates or synchronises, so every launch can
// be captured in a CUDA graph. Of index values they know nothing; kernels must not touch memory for an id outside the grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../ops.h"

namespace vmae2::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kSharedBytes = 48 << 10;  // more is an opt-in of each kernel on each device

inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this failure again
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

// Makes a device current and puts the former one back.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) : wanted_(device) {
    check(op, cudaGetDevice(&before_));
    if (before_ != wanted_) check(op, cudaSetDevice(wanted_));
  }
  ~DeviceGuard() {
    if (before_ != wanted_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int wanted_, before_ = 0;
};

// Launch kernel(arguments...) with `shared` bytes of dynamic shared memory; zero blocks are no launch.
template <class... Parameters, class... Arguments>
void launch(const char* op, const Queue& queue, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
            Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string(op) + ": more rows than a CUDA grid has blocks");
  if (shared > kSharedBytes) {
    throw std::runtime_error(std::string(op) + ": " + std::to_string(shared) + " bytes of shared memory a block, where " +
                             std::to_string(kSharedBytes) + " are what a kernel gets without asking");
  }
  const DeviceGuard guard(op, queue.device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = reinterpret_cast<cudaStream_t>(queue.stream);
  check(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  check(op, cudaGetLastError());
}

// Queue writing `bytes` zeros.
inline void fill_zeros(const char* op, const Queue& queue, void* memory, size_t bytes) {
  if (bytes == 0) return;
  const DeviceGuard guard(op, queue.device);
  check(op, cudaMemsetAsync(memory, 0, bytes, reinterpret_cast<cudaStream_t>(queue.stream)));
}

// The block's dynamic shared memory, the only kind that kernels use: 16-byte aligned, its contents undefined.
#ifdef __CUDACC__
__device__ inline unsigned char* shared_memory() {
  extern __shared__ uint4 words[];
  return reinterpret_cast<unsigned char*>(words);
}
#else
using emulator::shared_memory;  // tests/cuda_emulator
#endif

// Call body(T{}) with the storage type of a floating dtype.
template <class Body>
void with_device_float(Dtype dtype, const char* op, Body&& body) {
  switch (dtype) {
    case Dtype::f32: return body(float{});
    case Dtype::bf16: return body(__nv_bfloat16{});
    case Dtype::f16: return body(__half{});
    default: throw std::invalid_argument(std::string(op) + ": unsupported dtype code " + std::to_string(static_cast<int>(dtype)));
  }
}

// The same, uint8 included.
template <class Body>
void with_device_pixel(Dtype dtype, const char* op, Body&& body) {
  if (dtype == Dtype::u8) return body(uint8_t{});
  with_device_float(dtype, op, body);
}

inline bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

__device__ inline float load(uint8_t value) { return static_cast<float>(value); }
__device__ inline float load(float value) { return value; }
__device__ inline float load(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float load(__half value) { return __half2float(value); }

// Round to nearest, ties to even, as torch does.
__device__ inline void store(float& out, float value) { out = value; }
__device__ inline void store(__nv_bfloat16& out, float value) { out = __float2bfloat16_rn(value); }
__device__ inline void store(__half& out, float value) { out = __float2half_rn(value); }

// Two neighbours at once: one conversion instruction where the architecture has it.
__device__ inline void store2(float* out, float a, float b) {
  out[0] = a;
  out[1] = b;
}
__device__ inline void store2(__nv_bfloat16* out, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(a, b);
}
__device__ inline void store2(__half* out, float a, float b) { *reinterpret_cast<__half2*>(out) = __floats2half2_rn(a, b); }

// As many values as one 16-byte access moves.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

template <class T>
__device__ Vector<T> filled(float value) {
  Vector<T> vector;
#pragma unroll
  for (int j = 0; j < Vector<T>::size; ++j) store(vector.values[j], value);
  return vector;
}

__device__ inline float nan() { return __int_as_float(0x7fc00000); }

// Sum over a warp, the same in every lane whatever the timing.
__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Sum over a block of whole warps, valid in thread 0; `scratch` holds one value a warp and may be reused after a barrier.
__device__ inline double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / kWarp; ++w) value += scratch[w];
  }
  return value;
}

}  // namespace vmae2::cuda
