// How a token lies in a clip: its first pixel, the place of each element of its row, and its bytes staged in shared memory.
#pragma once

#include <algorithm>

#include "../cpu/dispatch.h"
#include "launch.cuh"

namespace vmae2::cuda {

constexpr int kMaxChannels = 16;

// Quotient and remainder by a number known at launch, for n < 2^31, by one multiplication (Granlund and Montgomery, Division
// by invariant integers using multiplication, PLDI 1994).
struct Divisor {
  uint32_t value, magic, shift;

  static Divisor of(int64_t value) {
    const auto d = static_cast<uint32_t>(value);
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < d) ++shift;
    return {d, static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1), shift};
  }
  __device__ uint32_t divide(uint32_t n, uint32_t& remainder) const {
    const uint32_t quotient = (__umulhi(n, magic) + n) >> shift;
    remainder = n - quotient * value;
    return quotient;
  }
};

struct Geometry {
  Layout layout;
  Divisor count;                       // rows of a sample
  Divisor grid_height, grid_width;     // tokens
  Divisor channels, tubelet, patch;
  int32_t tokens, row;
};

// A pixel's coordinates inside its token.
struct Place {
  uint32_t channel, frame, line, pixel;
};

inline Geometry geometry(const char* op, Dtype dtype, const Clip& s, int64_t count) {
  check_clip(op, s);
  if (s.channels > kMaxChannels) {
    throw std::invalid_argument(std::string(op) + ": CUDA kernels take at most " + std::to_string(kMaxChannels) +
                                " channels, got " + std::to_string(s.channels) + "; use_backend(\"reference\") takes any");
  }
  if (s.batch * count > INT32_MAX || s.tokens() > INT32_MAX || s.row() > INT32_MAX) {
    throw std::invalid_argument(std::string(op) + ": CUDA kernels count rows, tokens and a row's elements in 31 bits");
  }
  return {Layout::of(dtype, s), Divisor::of(std::max<int64_t>(count, 1)), Divisor::of(s.height / s.patch),
          Divisor::of(s.width / s.patch), Divisor::of(s.channels), Divisor::of(s.tubelet), Divisor::of(s.patch),
          static_cast<int32_t>(s.tokens()), static_cast<int32_t>(s.row())};
}

// value * scale + shift of each channel.
struct Affine {
  float scale[kMaxChannels], shift[kMaxChannels];

  static Affine of(const char* op, const Clip& s, const std::vector<float>& scale, const std::vector<float>& shift) {
    const auto channels = static_cast<size_t>(s.channels);
    if (scale.size() != channels || shift.size() != channels) {
      throw std::invalid_argument(std::string(op) + ": the statistics of channels need one value a channel");
    }
    Affine affine{};
    std::copy(scale.begin(), scale.end(), affine.scale);
    std::copy(shift.begin(), shift.end(), affine.shift);
    return affine;
  }
};

// No fused multiply-add: the result is the reference's, bit for bit.
template <class T>
__device__ float affine(T value, float scale, float shift) {
  return __fadd_rn(__fmul_rn(load(value), scale), shift);
}

// Offset of the first pixel of token `id`, which row `r` of the index names.
__device__ inline int64_t corner(const Geometry& g, uint32_t r, uint32_t id) {
  uint32_t unused, x, y;
  const uint32_t b = g.count.divide(r, unused);
  const uint32_t t = g.grid_height.divide(g.grid_width.divide(id, x), y);
  return b * g.layout.batch + static_cast<int64_t>(t) * g.tubelet.value * g.layout.frame +
         static_cast<int64_t>(y) * g.patch.value * g.layout.line + static_cast<int64_t>(x) * g.patch.value * g.layout.pixel;
}

// Where element k of a row belongs, in order (t, y, x, c) or (c, t, y, x).
__device__ inline Place place(const Geometry& g, uint32_t k, bool pixel_order) {
  Place at;
  if (pixel_order) {
    at.frame = g.patch.divide(g.patch.divide(g.channels.divide(k, at.channel), at.pixel), at.line);
  } else {
    at.channel = g.tubelet.divide(g.patch.divide(g.patch.divide(k, at.pixel), at.line), at.frame);
  }
  return at;
}

__device__ inline int64_t offset(const Layout& layout, const Place& at) {
  return at.channel * layout.channel + at.frame * layout.frame + at.line * layout.line + at.pixel * layout.pixel;
}

// Tokens of the models: bytes, 3 channels, 2 frames, patches of 16 or 14 pixels. A warp reads each line of such a token in
// words as wide as every line allows, 16 bytes for patches of 16, 4 bytes for those of 14 (whose lines of 42 bytes start at
// even addresses only: they are staged with the two bytes beside them, and `shift` finds their first).
template <int PATCH>
struct ByteToken {
  static constexpr int channels = 3, lines = 2 * PATCH, line = channels * PATCH, row = lines * line;
  using Word = std::conditional_t<line % 16 == 0, uint4, uint32_t>;
  static constexpr int words = (line + sizeof(Word) - 1) / sizeof(Word), pitch = words * sizeof(Word);
  static constexpr int staged = (lines * pitch + 15) / 16 * 16;  // bytes of shared memory

  const uint8_t* corner;
  int64_t frame_stride, line_stride;
  unsigned char* shared;

  __device__ void stage(int lane) const {
    constexpr int rounds = (lines * words + kWarp - 1) / kWarp;
    Word held[rounds];
    // All loads first: they are in flight together.
#pragma unroll
    for (int j = 0; j < rounds; ++j) {
      const int i = lane + j * kWarp, l = i / words;
      if (i < lines * words) held[j] = reinterpret_cast<const Word*>(start(l) - shift(l))[i % words];
    }
#pragma unroll
    for (int j = 0; j < rounds; ++j) {
      const int i = lane + j * kWarp;
      if (i < lines * words) reinterpret_cast<Word*>(shared)[i] = held[j];
    }
  }

  __device__ const uint8_t* start(int l) const { return corner + (l / PATCH) * frame_stride + (l % PATCH) * line_stride; }
  __device__ int shift(int l) const {
    if constexpr (line % sizeof(Word) == 0) return 0;
    return static_cast<int>(reinterpret_cast<uintptr_t>(start(l)) % sizeof(Word));
  }
  // First staged byte of line l.
  __device__ const uint8_t* bytes(int l) const { return shared + l * pitch + shift(l); }

  // Whether a clip's address allows such words. Every line then does, and none of them reaches outside the clip: its
  // size is a multiple of a word.
  static bool fits(const void* clip) { return aligned(clip, sizeof(Word)); }
};

// Call body(std::integral_constant<int, patch>) if the clip has tokens of the kind above; else return false.
template <class Body>
bool with_byte_token(Dtype dtype, const Clip& s, const void* clip, Body&& body) {
  if (dtype != Dtype::u8 || s.channels != 3 || s.tubelet != 2) return false;
  if (s.patch == 16 && ByteToken<16>::fits(clip)) return body(std::integral_constant<int, 16>{}), true;
  if (s.patch == 14 && ByteToken<14>::fits(clip)) return body(std::integral_constant<int, 14>{}), true;
  return false;
}

}  // namespace vmae2::cuda
