// From a run-time dtype to a compile-time type.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../ops.h"
#include "numeric.h"

namespace vmae2 {

// Call body(T{}) with the storage type of a floating dtype.
template <class Body>
void with_float(Dtype dtype, const char* op, Body&& body) {
  switch (dtype) {
    case Dtype::f32: return body(float{});
    case Dtype::bf16: return body(bf16{});
    case Dtype::f16: return body(f16{});
    default: throw std::invalid_argument(std::string(op) + ": unsupported dtype code " + std::to_string(static_cast<int>(dtype)));
  }
}

// The same, uint8 included.
template <class Body>
void with_pixel(Dtype dtype, const char* op, Body&& body) {
  if (dtype == Dtype::u8) return body(uint8_t{});
  with_float(dtype, op, body);
}

// Throw unless every id is in [-1, tokens). Before any thread starts, so kernels need no error path.
inline void check_index(const char* op, const int32_t* index, int64_t batch, int64_t count, int64_t tokens) {
  int32_t least = 0, most = -1;
  for (int64_t i = 0; i < batch * count; ++i) {
    least = std::min(least, index[i]);
    most = std::max(most, index[i]);
  }
  if (least >= -1 && most < tokens) return;
  for (int64_t i = 0;; ++i) {
    if (index[i] >= -1 && index[i] < tokens) continue;
    throw std::out_of_range(std::string(op) + ": index[" + std::to_string(i / count) + ", " + std::to_string(i % count) +
                            "] = " + std::to_string(index[i]) + " is outside [0, " + std::to_string(tokens) +
                            "); -1 marks padding");
  }
}

inline void check_clip(const char* op, const Clip& s) {
  if (s.batch < 0 || s.frames < 1 || s.height < 1 || s.width < 1 || s.channels < 1 || s.tubelet < 1 || s.patch < 1 ||
      s.frames % s.tubelet || s.height % s.patch || s.width % s.patch) {
    throw std::invalid_argument(std::string(op) + ": the clip is no whole number of patches");
  }
}

// Offset of a token's first pixel, and the strides of a pixel's coordinates, in elements.
struct Layout {
  int64_t batch, channel, frame, line, pixel;

  static Layout channels_last(const Clip& s) {
    return {s.frames * s.height * s.width * s.channels, 1, s.height * s.width * s.channels, s.width * s.channels, s.channels};
  }
  static Layout channels_first(const Clip& s) {
    const int64_t plane = s.height * s.width;
    return {s.channels * s.frames * plane, s.frames * plane, plane, s.width, 1};
  }
  static Layout of(Dtype dtype, const Clip& s) { return dtype == Dtype::u8 ? channels_last(s) : channels_first(s); }

  int64_t corner(const Clip& s, int64_t b, int64_t token) const {
    const int64_t height = s.height / s.patch, width = s.width / s.patch;
    const int64_t t = token / (height * width), y = token / width % height, x = token % width;
    return b * batch + t * s.tubelet * frame + y * s.patch * line + x * s.patch * pixel;
  }
};

// The cache line of an address into the cache; a hint that never faults.
inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#endif
}

// Every line of a token into the cache: the lines are too far apart for the processor to see them coming.
template <class Pixel>
inline void prefetch_token(const Pixel* corner, const Clip& s, const Layout& layout) {
  const bool planes = layout.pixel == 1;
  const int64_t last = (planes ? s.patch : s.patch * s.channels) - 1;
  for (int64_t c = 0; c < (planes ? s.channels : 1); ++c) {
    for (int64_t t = 0; t < s.tubelet; ++t) {
      for (int64_t y = 0; y < s.patch; ++y) {
        const Pixel* line = corner + c * layout.channel + t * layout.frame + y * layout.line;
        prefetch(line);
        prefetch(line + last);
      }
    }
  }
}

}  // namespace vmae2
