// Windows of decoded frames resized to a clip. See vmae2_fast/ops/resize.py: every path here gives those exact integers.
//
// A row of a clip is made of sums along source lines and down their columns; no image between frame and clip is stored. Lines
// of YUV planes are made RGB where they are read, as many as the filter of one row covers at a time.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "../ops.h"
#include "parallel.h"
#include "yuv.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VMAE2_RESIZE_AVX2
#include <immintrin.h>
#endif

namespace vmae2 {
namespace {

// The filter of one axis: output i is sum_k weight[i*count + k] * source[first[i] + k] / sum[i].
struct Taps {
  int64_t count;              // taps an output
  int64_t begin = 0, end = 0; // sources that are read
  bool identity;
  int64_t largest_sum = 0;
  std::vector<int64_t> first, sum;
  std::vector<int32_t> weight;

  // Outputs [start, start + size) of a grid of `grid` over `source` pixels, the last one first if `flip`.
  Taps(int64_t source, int64_t grid, int64_t start, int64_t size, bool flip) : identity(source == grid) {
    const int64_t common = std::gcd(source, grid), n = source / common, m = grid / common, reach = 2 * std::max(n, m);
    count = identity ? 1 : std::min(source, (reach + m - 1) / m);
    begin = source;
    for (int64_t o = 0; o < size; ++o) {
      const int64_t centre = (2 * (start + (flip ? size - 1 - o : o)) + 1) * n;
      // The first source less than `reach` from the centre. Where it is clamped, the weights of the others are zero.
      const int64_t low = centre - reach - m;
      const int64_t left = std::clamp<int64_t>(low < 0 ? 0 : low / (2 * m) + 1, 0, source - count);
      int64_t total = 0;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t w = std::max<int64_t>(0, reach - std::abs((2 * (left + k) + 1) * m - centre));
        weight.push_back(static_cast<int32_t>(w));
        total += w;
      }
      first.push_back(left);
      sum.push_back(total);
      begin = std::min(begin, left);
      end = std::max(end, left + count);
      largest_sum = std::max(largest_sum, total);
    }
  }
};

struct View {
  const uint8_t* corner;  // of the window in the first frame
  int64_t frame, line;    // strides in bytes
  Taps y, x;
  bool flip;
  // Chroma of the corner, and whether that is the second line or column of those that share it; null in RGB frames.
  const uint8_t *u, *v;
  int64_t odd_top, odd_left;
  YuvColor color;
};

// Nearest integer to sum / total, halves up.
uint8_t rounded(int64_t sum, int64_t total) { return static_cast<uint8_t>((2 * sum + total) / (2 * total)); }

#ifdef VMAE2_RESIZE_AVX2

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}

// Mirror a line of three channels, five pixels a step; returns how many were written. A step reads the byte before its
// pixels and writes the one after, so the last pixels are left to the caller.
__attribute__((target("avx2"))) int64_t mirror3(const uint8_t* row, int64_t width, uint8_t* out) {
  const __m128i order = _mm_setr_epi8(13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, -1);
  int64_t p = 0;
  for (; p + 5 < width; p += 5) {
    const __m128i five = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (width - 5 - p) * 3 - 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + p * 3), _mm_shuffle_epi8(five, order));
  }
  return p;
}

#else

bool has_avx2() { return false; }

#endif

// Source lines of a frame, from the first column a view reads: where they lie, or made RGB.
class Lines {
 public:
  // Bytes that may be read behind the last pixel of a converted line.
  static constexpr int64_t kPadding = 16;

  void enter(const View& view, int64_t frame) {
    if (view_ != &view) {
      view_ = &view;
      width_ = view.x.end - view.x.begin;
      if (view.u != nullptr) rgb_.resize(static_cast<size_t>(view.y.count * (3 * width_ + kPadding)));
      frame_ = -1;
    }
    if (frame_ != frame) {
      frame_ = frame;
      corner_ = view.corner + frame * view.frame;
      if (view.u != nullptr) held_.assign(static_cast<size_t>(view.y.count), -1);
    }
  }

  // Line `j` of the window. A converted one stays until y.count lines further on are asked for.
  template <int CHANNELS>
  const uint8_t* at(int64_t j) {
    const View& view = *view_;
    if (view.u == nullptr) return corner_ + j * view.line + view.x.begin * CHANNELS;
    const auto slot = static_cast<size_t>(j % view.y.count);
    uint8_t* line = rgb_.data() + static_cast<int64_t>(slot) * (3 * width_ + kPadding);
    if (held_[slot] != j) {
      held_[slot] = j;
      const int64_t column = view.odd_left + view.x.begin;
      const int64_t chroma = frame_ * view.frame + (view.odd_top + j) / 2 * ((view.line + 1) / 2) + column / 2;
      yuv_line(view.color, corner_ + j * view.line + view.x.begin, view.u + chroma, view.v + chroma, column % 2, width_,
               has_avx2(), line);
    }
    return line;
  }

 private:
  const View* view_ = nullptr;
  int64_t frame_ = -1, width_ = 0;
  const uint8_t* corner_ = nullptr;  // of the window in the frame
  std::vector<int64_t> held_;        // which line is in a slot of rgb_
  std::vector<uint8_t> rgb_;
};

template <int CHANNELS>
void copy_row(const View& view, const uint8_t* row, int64_t width, uint8_t* out) {
  if (!view.flip) {
    std::memcpy(out, row, static_cast<size_t>(width * CHANNELS));
    return;
  }
  int64_t p = 0;
#ifdef VMAE2_RESIZE_AVX2
  if (CHANNELS == 3 && has_avx2()) p = mirror3(row, width, out);
#endif
  for (; p < width; ++p) std::memcpy(out + p * CHANNELS, row + (width - 1 - p) * CHANNELS, CHANNELS);
}

// Any ratio on any processor: columns first, then along the line of their sums.
template <int CHANNELS>
void portable_row(const View& view, Lines& lines, int64_t i, int64_t width, std::vector<int64_t>& line, uint8_t* out) {
  const Taps &y = view.y, &x = view.x;
  const int64_t n = (x.end - x.begin) * CHANNELS;
  line.assign(static_cast<size_t>(n), 0);
  for (int64_t k = 0; k < y.count; ++k) {
    const int64_t weight = y.weight[i * y.count + k];
    const uint8_t* row = lines.at<CHANNELS>(y.first[i] + k);
    for (int64_t e = 0; e < n; ++e) line[e] += weight * row[e];
  }
  for (int64_t p = 0; p < width; ++p) {
    const int64_t* source = line.data() + (x.first[p] - x.begin) * CHANNELS;
    for (int64_t c = 0; c < CHANNELS; ++c) {
      int64_t sum = 0;
      for (int64_t k = 0; k < x.count; ++k) sum += x.weight[p * x.count + k] * source[k * CHANNELS + c];
      out[p * CHANNELS + c] = rounded(sum, y.sum[i] * x.sum[p]);
    }
  }
}

#ifdef VMAE2_RESIZE_AVX2

// Along a line in exact 32-bit integers, then down the columns in float. A float sum is off by less than `error`; a result
// that near to a half is computed again in integers, unless the ratio's denominator is so small that halves are the only
// fractions near one: then half a step of that denominator, added before truncating, decides them as integers would.
template <int CHANNELS>
class Avx2Rows {
  static constexpr int64_t kMostTaps = 64;     // beyond, float errors are no longer small beside the denominator's steps
  static constexpr int kFraction = 1 << 16;    // fixed point of a result
  static constexpr int64_t kBlock = 32;        // results a step
  using Floats = std::vector<float>;

 public:
  Avx2Rows(const uint8_t* buffer_end, Lines& lines) : end_(buffer_end), source_lines_(lines) {}

  static bool takes(const View& view) {
    return view.x.count <= kMostTaps && view.y.count <= kMostTaps && has_avx2();
  }

  __attribute__((target("avx2,fma"))) void row(const View& view, int64_t frame, int64_t i, int64_t width, uint8_t* out) {
    if (&view != view_) prepare(view, width);
    const Taps& y = view.y;
    if (frame != frame_ || y.first[i] < next_ - y.count || y.first[i] > next_) next_ = y.first[i];
    frame_ = frame;
    for (; next_ < y.first[i] + y.count; ++next_) along(source_lines_.at<CHANNELS>(next_), line(next_));
    const float* lines[kMostTaps];
    float weight[kMostTaps];
    for (int64_t k = 0; k < y.count; ++k) {
      lines[k] = line(y.first[i] + k);
      weight[k] = static_cast<float>(y.weight[i * y.count + k]) / static_cast<float>(y.sum[i]);
    }
    switch (y.count) {
      case 1: down<1>(lines, weight, i); break;
      case 2: down<2>(lines, weight, i); break;
      case 3: down<3>(lines, weight, i); break;
      default: down<0>(lines, weight, i);
    }
    std::memcpy(out, result_.data(), static_cast<size_t>(width * CHANNELS));
  }

 private:
  const uint8_t* end_;             // of the buffer
  const View* view_ = nullptr;
  Lines& source_lines_;
  int64_t frame_ = -1;
  int64_t next_ = 0;               // lines [next_ - y.count, next_) of the frame are in lines_
  int64_t pixels_ = 0, padded_ = 0;  // of a row; its results in whole blocks
  int32_t error_ = 0;              // in kFraction; 0 where no result is doubtful
  float half_ = 0;
  std::vector<int16_t> weight_;    // two taps a channel for two pixels: what one instruction multiplies
  std::vector<int32_t> first_;     // byte of a pixel's first source
  std::vector<uint8_t> source_, result_;
  Floats lines_, inverse_;

  float* line(int64_t source) { return lines_.data() + source % view_->y.count * (padded_ + 8); }

  void prepare(const View& view, int64_t width) {
    view_ = &view;
    frame_ = -1;
    const Taps &x = view.x, &y = view.y;
    pixels_ = width;
    padded_ = (width * CHANNELS + kBlock - 1) / kBlock * kBlock;
    const int64_t pairs = (x.count + 1) / 2;
    weight_.assign(static_cast<size_t>((width + 1) / 2 * pairs * 16), 0);
    first_.assign(static_cast<size_t>(width + 1), 0);
    inverse_.assign(static_cast<size_t>(padded_), 0.0f);
    for (int64_t p = 0; p < width; ++p) {
      first_[p] = static_cast<int32_t>((x.first[p] - x.begin) * CHANNELS);
      for (int64_t k = 0; k < x.count; ++k) {
        int16_t* pair = weight_.data() + ((p / 2 * pairs + k / 2) * 2 + p % 2) * 8;
        for (int64_t c = 0; c < CHANNELS; ++c) pair[2 * c + k % 2] = static_cast<int16_t>(x.weight[p * x.count + k]);
      }
      for (int64_t c = 0; c < CHANNELS; ++c) inverse_[p * CHANNELS + c] = kFraction / static_cast<float>(x.sum[p]);
    }
    source_.assign(static_cast<size_t>((x.end - x.begin) * CHANNELS + 16), 0);
    result_.assign(static_cast<size_t>(padded_), 0);
    lines_.assign(static_cast<size_t>(y.count * (padded_ + 8)), 0.0f);
    // A relative error of 2^-24 for each of y.count additions and 5 other roundings, of values up to 255.5.
    error_ = static_cast<int32_t>(y.count + 8);
    half_ = 0.5f * kFraction;
    const int64_t step = kFraction / (4 * x.largest_sum * y.largest_sum);  // results are multiples of twice this
    if (step >= error_) {
      half_ += static_cast<float>(step);
      error_ = 0;
    }
  }

  // Sums along one source line, two pixels a step; the fourth lane of three channels is the next pixel's first.
  template <int PAIRS>
  __attribute__((target("avx2,fma"))) void along(const uint8_t* source, float* line) const {
    constexpr char n = CHANNELS, no = -1, a = CHANNELS > 3 ? 3 : no, b = CHANNELS > 3 ? 7 : no;
    constexpr char f = 2 * n, fa = CHANNELS > 3 ? 11 : no, fb = CHANNELS > 3 ? 15 : no;
    const __m256i near = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, no, n, no, 1, no, n + 1, no, 2, no, n + 2, no, a, no, b, no));
    const __m256i far = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(f, no, f + n, no, f + 1, no, f + n + 1, no, f + 2, no, f + n + 2, no, fa, no, fb, no));
    const auto* weight = reinterpret_cast<const __m256i*>(weight_.data());
    const int32_t* first = first_.data();
    const int64_t pairs = PAIRS ? PAIRS : (view_->x.count + 1) / 2, pixels = pixels_;
    for (int64_t p = 0; p < pixels; p += 2, line += 2 * CHANNELS) {
      const uint8_t *left = source + first[p], *right = source + first[p + 1];
      __m256i sum = _mm256_setzero_si256();
      for (int64_t k = 0; k < pairs; k += 2, left += 4 * CHANNELS, right += 4 * CHANNELS) {
        const __m256i bytes = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(left))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(right)), 1);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(bytes, near), _mm256_loadu_si256(weight++)));
        if (k + 1 < pairs) {
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(bytes, far), _mm256_loadu_si256(weight++)));
        }
      }
      const __m256 value = _mm256_cvtepi32_ps(sum);
      _mm_storeu_ps(line, _mm256_castps256_ps128(value));
      _mm_storeu_ps(line + CHANNELS, _mm256_extractf128_ps(value, 1));
    }
  }

  __attribute__((target("avx2,fma"))) void along(const uint8_t* source, float* line) {
    const Taps& x = view_->x;
    const int64_t bytes = (x.end - x.begin) * CHANNELS;
    // 16 bytes are read from any pixel on: not where the buffer ends.
    if (view_->u == nullptr && end_ - source < bytes + Lines::kPadding) {
      std::memcpy(source_.data(), source, static_cast<size_t>(bytes));
      source = source_.data();
    }
    switch ((x.count + 1) / 2) {
      case 1: return along<1>(source, line);
      case 2: return along<2>(source, line);
      default: return along<0>(source, line);
    }
  }

  // A row of results from its lines.
  template <int TAPS>
  __attribute__((target("avx2,fma"))) void down(const float* const* lines, const float* weight, int64_t i) {
    const int64_t taps = TAPS ? TAPS : view_->y.count, size = padded_;
    const float* inverse = inverse_.data();
    uint8_t* result = result_.data();
    const __m256 half = _mm256_set1_ps(half_);
    const __m256i error = _mm256_set1_epi16(static_cast<int16_t>(error_)), twice = _mm256_add_epi16(error, error);
    const __m256i zero = _mm256_setzero_si256();
    // Packing works within 128-bit halves; the permutation puts the eight groups of four back in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t e = 0; e < size; e += kBlock) {
      __m256 sum[4];
      for (int v = 0; v < 4; ++v) sum[v] = _mm256_mul_ps(_mm256_set1_ps(weight[0]), _mm256_loadu_ps(lines[0] + e + 8 * v));
      for (int64_t k = 1; k < taps; ++k) {
        const __m256 w = _mm256_broadcast_ss(weight + k);
        for (int v = 0; v < 4; ++v) sum[v] = _mm256_fmadd_ps(w, _mm256_loadu_ps(lines[k] + e + 8 * v), sum[v]);
      }
      __m256i fixed[4];
      for (int v = 0; v < 4; ++v) {
        fixed[v] = _mm256_cvtps_epi32(_mm256_fmadd_ps(sum[v], _mm256_loadu_ps(inverse + e + 8 * v), half));
      }
      const __m256i low = _mm256_packus_epi32(_mm256_srli_epi32(fixed[0], 16), _mm256_srli_epi32(fixed[1], 16));
      const __m256i high = _mm256_packus_epi32(_mm256_srli_epi32(fixed[2], 16), _mm256_srli_epi32(fixed[3], 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + e),
                          _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
      if (!error_) continue;
      // Fractions less than `error` from a whole number wrap to less than twice that; the least of four says if any does.
      const __m256i some = _mm256_add_epi16(_mm256_blend_epi16(fixed[0], _mm256_slli_epi32(fixed[1], 16), 0xaa), error);
      const __m256i others = _mm256_add_epi16(_mm256_blend_epi16(fixed[2], _mm256_slli_epi32(fixed[3], 16), 0xaa), error);
      const __m256i doubt = _mm256_subs_epu16(_mm256_min_epu16(some, others), twice);
      if (_mm256_movemask_epi8(_mm256_cmpeq_epi16(doubt, zero))) settle(fixed, i, e);
    }
  }

  // Compute those of a block's results in integers that float may have put on the wrong side of a half.
  __attribute__((noinline)) void settle(const void* block, int64_t i, int64_t e) {
    int32_t fixed[kBlock];
    std::memcpy(fixed, block, sizeof(fixed));
    for (int64_t k = 0; k < kBlock; ++k) {
      if (((fixed[k] + error_) & (kFraction - 1)) <= 2 * error_) result_[e + k] = exact(i, e + k);
    }
  }

  uint8_t exact(int64_t i, int64_t e) const {
    const Taps &x = view_->x, &y = view_->y;
    const int64_t p = e / CHANNELS;
    int64_t sum = 0;
    for (int64_t j = 0; j < y.count; ++j) {
      const uint8_t* source = source_lines_.at<CHANNELS>(y.first[i] + j) + (x.first[p] - x.begin) * CHANNELS + e % CHANNELS;
      int64_t along_line = 0;
      for (int64_t k = 0; k < x.count; ++k) along_line += x.weight[p * x.count + k] * source[k * CHANNELS];
      sum += y.weight[i * y.count + j] * along_line;
    }
    return rounded(sum, y.sum[i] * x.sum[p]);
  }
};

#endif  // VMAE2_RESIZE_AVX2

template <int CHANNELS>
void resize_rows(const std::vector<View>& plans, [[maybe_unused]] const uint8_t* buffer_end, int64_t frames, int64_t height,
                 int64_t width, uint8_t* out, int threads) {
  int64_t cost = 1;
  for (const View& view : plans) {
    cost = std::max(cost, ((view.x.end - view.x.begin) * view.y.count + width * view.x.count) * CHANNELS);
  }
  const auto rows = static_cast<int64_t>(plans.size()) * frames * height;
  parallel_for(rows, cost, threads, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> line;
    Lines lines;
#ifdef VMAE2_RESIZE_AVX2
    Avx2Rows<CHANNELS> avx2(buffer_end, lines);
#endif
    for (int64_t r = begin; r < end; ++r) {
      const View& view = plans[static_cast<size_t>(r / (frames * height))];
      const int64_t i = r % height;
      const int64_t frame = r / height % frames;
      uint8_t* row = out + r * width * CHANNELS;
      lines.enter(view, frame);
      if (view.y.identity && view.x.identity) {
        copy_row<CHANNELS>(view, lines.at<CHANNELS>(view.y.first[i]), width, row);
        continue;
      }
#ifdef VMAE2_RESIZE_AVX2
      if (CHANNELS >= 3 && Avx2Rows<CHANNELS>::takes(view)) {
        avx2.row(view, frame, i, width, row);
        continue;
      }
#endif
      portable_row<CHANNELS>(view, lines, i, width, line, row);
    }
  });
}

}  // namespace

void resize_crop(const uint8_t* buffer, int64_t bytes, const int64_t* table, int64_t views, int64_t frames, int64_t height,
                 int64_t width, int64_t channels, uint8_t* out, int threads) {
  if (views < 0 || frames < 0 || height < 1 || width < 1) throw std::invalid_argument("resize_crop: a clip has no pixels");
  std::vector<View> plans;
  plans.reserve(static_cast<size_t>(views));
  for (int64_t v = 0; v < views; ++v) {
    const int64_t* t = table + v * kResizeColumns;
    const bool flip = t[9] != 0, yuv = t[15] != 0;
    if (yuv && channels != 3) throw std::invalid_argument("resize_crop: YUV frames make clips of 3 channels");
    const auto c = [t](int i) { return static_cast<int32_t>(t[i]); };
    plans.push_back({buffer + t[0], t[1], t[2], Taps(t[3], t[5], t[7], height, false), Taps(t[4], t[6], t[8], width, flip), flip,
                     yuv ? buffer + t[10] : nullptr, yuv ? buffer + t[11] : nullptr, t[12], t[13],
                     {c(14), c(15), c(16), c(17), c(18), c(19)}});
  }
  switch (channels) {
    case 1: return resize_rows<1>(plans, buffer + bytes, frames, height, width, out, threads);
    case 2: return resize_rows<2>(plans, buffer + bytes, frames, height, width, out, threads);
    case 3: return resize_rows<3>(plans, buffer + bytes, frames, height, width, out, threads);
    case 4: return resize_rows<4>(plans, buffer + bytes, frames, height, width, out, threads);
    default: throw std::invalid_argument("resize_crop: frames must have 1 to 4 channels, got " + std::to_string(channels));
  }
}

}  // namespace vmae2
