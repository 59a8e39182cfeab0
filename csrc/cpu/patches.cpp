// Patches by index: gather rows from a clip, scatter rows into one. See vmae2_fast/ops/patches.py.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "parallel.h"

namespace vmae2 {
namespace {

// Strides of a row's coordinates (channel, frame, line, pixel) in order (c, t, y, x) or (t, y, x, c).
Layout row_layout(const Clip& s, bool pixel_order) {
  const int64_t p = s.patch;
  if (pixel_order) return {s.row(), 1, p * p * s.channels, p * s.channels, s.channels};
  return {s.row(), s.tubelet * p * p, p * p, p, 1};
}

// out[i*OUT] = in[i*IN] * scale + shift, for one line of one channel. Strides are compile-time where they are common,
// so that the compiler can vectorise; 0 stands for a stride known at run time only.
template <int IN, int OUT, class In, class Out>
void line(const In* in, int64_t in_stride, Out* out, int64_t out_stride, int64_t n, float scale, float shift) {
  if (IN) in_stride = IN;
  if (OUT) out_stride = OUT;
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<In, uint8_t>) {
      store(out[i * out_stride], load(in[i * in_stride]) * scale + shift);
    } else if constexpr (std::is_same_v<In, Out>) {
      out[i * out_stride] = in[i * in_stride];  // a copy, bit for bit
    } else {
      store(out[i * out_stride], load(in[i * in_stride]));
    }
  }
}

// Copy one token between two layouts, both given by the address of the token's first pixel.
template <int IN, int OUT, class In, class Out>
void token(const In* in, const Layout& from, Out* out, const Layout& to, const Clip& s, const float* scale, const float* shift) {
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t t = 0; t < s.tubelet; ++t) {
      for (int64_t y = 0; y < s.patch; ++y) {
        line<IN, OUT>(in + c * from.channel + t * from.frame + y * from.line, from.pixel,
                      out + c * to.channel + t * to.frame + y * to.line, to.pixel, s.patch, scale ? scale[c] : 1.0f,
                      shift ? shift[c] : 0.0f);
      }
    }
  }
}

template <class In, class Out>
void token(const In* in, const Layout& from, Out* out, const Layout& to, const Clip& s, const float* scale, const float* shift) {
  if (from.pixel == 1 && to.pixel == 1) return token<1, 1>(in, from, out, to, s, scale, shift);
  if (from.pixel == 3 && to.pixel == 1) return token<3, 1>(in, from, out, to, s, scale, shift);
  if (from.pixel == 1 && to.pixel == 3) return token<1, 3>(in, from, out, to, s, scale, shift);
  if (from.pixel == 3 && to.pixel == 3) return token<3, 3>(in, from, out, to, s, scale, shift);
  token<0, 0>(in, from, out, to, s, scale, shift);
}

}  // namespace

void gather_patches(const void* clip, Dtype clip_dtype, const Clip& shape, const int32_t* index, int64_t count,
                    const std::vector<float>& scale, const std::vector<float>& shift, bool pixel_order, void* rows,
                    Dtype rows_dtype, int threads) {
  check_clip("gather_patches", shape);
  check_index("gather_patches", index, shape.batch, count, shape.tokens());
  const auto channels = static_cast<size_t>(shape.channels);
  if (scale.size() != channels || shift.size() != channels) {
    throw std::invalid_argument("gather_patches: scale and shift need one value a channel");
  }
  const Layout from = Layout::of(clip_dtype, shape), to = row_layout(shape, pixel_order);
  with_pixel(clip_dtype, "gather_patches", [&](auto in_type) {
    with_float(rows_dtype, "gather_patches", [&](auto out_type) {
      const auto* in = static_cast<const decltype(in_type)*>(clip);
      auto* out = static_cast<decltype(out_type)*>(rows);
      parallel_for(shape.batch * count, to.batch, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          if (index[r] < 0) {
            std::memset(static_cast<void*>(out + r * to.batch), 0, static_cast<size_t>(to.batch) * sizeof(*out));
          } else {
            token(in + from.corner(shape, r / count, index[r]), from, out + r * to.batch, to, shape, scale.data(), shift.data());
          }
        }
      });
    });
  });
}

void scatter_patches(const void* rows, Dtype dtype, const int32_t* index, int64_t count, const Clip& shape,
                     bool pixel_order, void* clip, int threads) {
  check_clip("scatter_patches", shape);
  check_index("scatter_patches", index, shape.batch, count, shape.tokens());
  // Two rows for one token would race; their sum is not worth a slower kernel, so they are refused.
  std::vector<uint8_t> taken;
  for (int64_t b = 0; b < shape.batch; ++b) {
    taken.assign(static_cast<size_t>(shape.tokens()), 0);
    for (int64_t k = 0; k < count; ++k) {
      const int32_t id = index[b * count + k];
      if (id < 0) continue;
      if (taken[static_cast<size_t>(id)]++) {
        throw std::invalid_argument("scatter_patches: index[" + std::to_string(b) + "] holds token " + std::to_string(id) +
                                    " twice; indices of a row must be distinct");
      }
    }
  }
  const Layout from = row_layout(shape, pixel_order), to = Layout::channels_first(shape);
  with_float(dtype, "scatter_patches", [&](auto type) {
    const auto* in = static_cast<const decltype(type)*>(rows);
    auto* out = static_cast<decltype(type)*>(clip);
    parallel_for(shape.batch * count, from.batch, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (index[r] < 0) continue;
        token(in + r * from.batch, from, out + to.corner(shape, r / count, index[r]), to, shape, nullptr, nullptr);
      }
    });
  });
}

}  // namespace vmae2
