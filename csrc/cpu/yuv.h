// Lines of YUV 4:2:0 planes as RGB. See vmae2_fast/ops/yuv.py: every path here gives those exact integers.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VMAE2_YUV_AVX2
#include <immintrin.h>
#endif

namespace vmae2 {

struct YuvColor {
  static constexpr int kShift = 13;
  int32_t black, y, rv, gu, gv, bu;  // coefficients in 1 / 2^kShift, each below 2^15
};

// The pixel of one luma and two chroma samples.
inline void yuv_pixel(const YuvColor& color, int32_t y, int32_t u, int32_t v, uint8_t* out) {
  const int32_t luma = color.y * (y - color.black) + (1 << (YuvColor::kShift - 1));
  u -= 128;
  v -= 128;
  const auto level = [](int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> YuvColor::kShift, 0, 255)); };
  out[0] = level(luma + color.rv * v);
  out[1] = level(luma + color.gu * u + color.gv * v);
  out[2] = level(luma + color.bu * u);
}

#ifdef VMAE2_YUV_AVX2

// Sixteen pixels a step from an even one on; returns how many were written.
__attribute__((target("avx2"))) inline int64_t yuv_line_avx2(const YuvColor& color, const uint8_t* y, const uint8_t* u,
                                                             const uint8_t* v, int64_t count, uint8_t* out) {
  const auto pair = [](int32_t low, int32_t high) {
    return static_cast<int32_t>((static_cast<uint32_t>(high) << 16) | (static_cast<uint32_t>(low) & 0xffff));
  };
  // Luma stands beside a one that brings the half to round with, U beside V.
  const __m256i by_luma = _mm256_set1_epi32(pair(color.y, 1 << (YuvColor::kShift - 1)));
  const __m256i by_chroma[3] = {_mm256_set1_epi32(pair(0, color.rv)), _mm256_set1_epi32(pair(color.gu, color.gv)),
                                _mm256_set1_epi32(pair(color.bu, 0))};
  const __m256i black = _mm256_set1_epi16(static_cast<int16_t>(color.black)), one = _mm256_set1_epi16(1);
  const __m128i middle = _mm_set1_epi16(128);
  // Eight pixels of planes R and G in a vector, and of B in another, to 16 bytes and 8 more.
  const __m256i rg = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, -1, 1, 9, -1, 2, 10, -1, 3, 11, -1, 4, 12, -1, 5));
  const __m256i b = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1));
  const __m256i rg_end =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(13, -1, 6, 14, -1, 7, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i b_end =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, -1, -1, -1, -1, -1, -1));
  int64_t p = 0;
  for (; p + 16 <= count; p += 16, out += 48) {
    const __m256i luma = _mm256_sub_epi16(
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(y + p))), black);
    // Pixels 0-3 and 8-11, then 4-7 and 12-15: packing puts them in order.
    const __m256i near = _mm256_madd_epi16(_mm256_unpacklo_epi16(luma, one), by_luma);
    const __m256i far = _mm256_madd_epi16(_mm256_unpackhi_epi16(luma, one), by_luma);
    const __m128i us = _mm_sub_epi16(
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(u + p / 2))), middle);
    const __m128i vs = _mm_sub_epi16(
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v + p / 2))), middle);
    const __m256i chroma = _mm256_set_m128i(_mm_unpackhi_epi16(us, vs), _mm_unpacklo_epi16(us, vs));
    __m256i level[3];
    for (int c = 0; c < 3; ++c) {
      const __m256i sum = _mm256_madd_epi16(chroma, by_chroma[c]);
      level[c] = _mm256_packs_epi32(
          _mm256_srai_epi32(_mm256_add_epi32(near, _mm256_unpacklo_epi32(sum, sum)), YuvColor::kShift),
          _mm256_srai_epi32(_mm256_add_epi32(far, _mm256_unpackhi_epi32(sum, sum)), YuvColor::kShift));
    }
    const __m256i two = _mm256_packus_epi16(level[0], level[1]), last = _mm256_packus_epi16(level[2], level[2]);
    const __m256i begin = _mm256_or_si256(_mm256_shuffle_epi8(two, rg), _mm256_shuffle_epi8(last, b));
    const __m256i end = _mm256_or_si256(_mm256_shuffle_epi8(two, rg_end), _mm256_shuffle_epi8(last, b_end));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(begin));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 16), _mm256_castsi256_si128(end));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 24), _mm256_extracti128_si256(begin, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 40), _mm256_extracti128_si256(end, 1));
  }
  return p;
}

#endif

// `count` pixels of a line, three bytes each; `odd` is 1 where the first is the second of those that share its chroma.
inline void yuv_line(const YuvColor& color, const uint8_t* y, const uint8_t* u, const uint8_t* v, int64_t odd, int64_t count,
                     [[maybe_unused]] bool avx2, uint8_t* out) {
  if (odd != 0 && count > 0) {
    yuv_pixel(color, *y++, *u++, *v++, out);
    out += 3;
    --count;
  }
  int64_t p = 0;
#ifdef VMAE2_YUV_AVX2
  if (avx2) p = yuv_line_avx2(color, y, u, v, count, out);
#endif
  for (; p < count; ++p) yuv_pixel(color, y[p], u[p / 2], v[p / 2], out + 3 * p);
}

}  // namespace vmae2
