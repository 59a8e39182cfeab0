// Patches by index: gather rows from a clip, scatter rows into one. See vmae2_fast/ops/patches.py.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"

namespace vmae2 {
namespace {

// Strides of a row's coordinates (channel, frame, line, pixel) in order (c, t, y, x) or (t, y, x, c).
Layout row_layout(const Clip& s, bool pixel_order) {
  const int64_t p = s.patch;
  if (pixel_order) return {s.row(), 1, p * p * s.channels, p * s.channels, s.channels};
  return {s.row(), s.tubelet * p * p, p * p, p, 1};
}

struct Gather {
  const void* clip;
  Clip shape;
  const int32_t* index;
  int64_t count;
  const float *scale, *shift;            // per channel
  const float *line_scale, *line_shift;  // the same for each value of a line of bytes
  bool pixel_order;
  void* rows;
  Layout from, to;
  // Sixteen pixels (fewer in a narrower patch) of C <= 4 interleaved channels are read as C times sixteen bytes at `offset`,
  // the last of which must not pass the line's end; pick[c][i] are channel c's places in the i-th, 0x80 where it has none.
  int64_t offset[4];
  uint8_t pick[4][4][16];

  void prepare_picks() {
    const int64_t channels = shape.channels, width = std::min<int64_t>(shape.patch, 16), bytes = width * channels;
    if (channels > 4 || bytes < 16) return;
    for (int64_t i = 0; i < channels; ++i) offset[i] = std::min<int64_t>(16 * i, bytes - 16);
    std::memset(pick, 0x80, sizeof(pick));
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < width; ++x) {
        const int64_t at = x * channels + c, i = std::min(at / 16, channels - 1);
        pick[c][i][x] = static_cast<uint8_t>(at - offset[i]);
      }
    }
  }
};

struct Scatter {
  const void* rows;
  Clip shape;
  const int32_t* owner;  // [batch, tokens], the row of each token or -1
  bool pixel_order;
  void* clip;
  Layout from, to;
};

}  // namespace
}  // namespace vmae2

#define VMAE2_KERNELS "patches_kernels.h"
#include "each_isa.h"

namespace vmae2 {

void gather_patches(const void* clip, Dtype clip_dtype, const Clip& shape, const int32_t* index, int64_t count,
                    const std::vector<float>& scale, const std::vector<float>& shift, bool pixel_order, void* rows,
                    Dtype rows_dtype, int threads) {
  check_clip("gather_patches", shape);
  check_index("gather_patches", index, shape.batch, count, shape.tokens());
  const auto channels = static_cast<size_t>(shape.channels);
  if (scale.size() != channels || shift.size() != channels) {
    throw std::invalid_argument("gather_patches: scale and shift need one value a channel");
  }
  std::vector<float> line_scale, line_shift;
  for (int64_t x = 0; pixel_order && x < shape.patch; ++x) {
    line_scale.insert(line_scale.end(), scale.begin(), scale.end());
    line_shift.insert(line_shift.end(), shift.begin(), shift.end());
  }
  Gather job{clip, shape, index, count, scale.data(), shift.data(), line_scale.data(), line_shift.data(), pixel_order, rows,
             Layout::of(clip_dtype, shape), row_layout(shape, pixel_order), {}, {}};
  job.prepare_picks();
  const int64_t all = shape.batch * count;
  with_pixel(clip_dtype, "gather_patches", [&](auto in_type) {
    with_float(rows_dtype, "gather_patches", [&](auto out_type) {
      using In = decltype(in_type);
      using Out = decltype(out_type);
      expect_writes(rows, all * shape.row() * static_cast<int64_t>(sizeof(Out)));
      const auto kernel = VMAE2_PICK(gather_rows<In, Out>);
      parallel_for(all, shape.row(), threads, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    });
  });
}

void scatter_patches(const void* rows, Dtype dtype, const int32_t* index, int64_t count, const Clip& shape,
                     bool pixel_order, void* clip, int threads) {
  check_clip("scatter_patches", shape);
  const int64_t tokens = shape.tokens();
  check_index("scatter_patches", index, shape.batch, count, tokens);
  std::vector<int32_t> owner(static_cast<size_t>(shape.batch * tokens), -1);
  for (int64_t r = 0; r < shape.batch * count; ++r) {
    if (index[r] < 0) continue;
    int32_t& slot = owner[static_cast<size_t>(r / count * tokens + index[r])];
    // Two rows for one token: their sum is not worth a slower kernel.
    if (slot >= 0) {
      throw std::invalid_argument("scatter_patches: index[" + std::to_string(r / count) + "] holds token " +
                                  std::to_string(index[r]) + " twice; indices of a row must be distinct");
    }
    slot = static_cast<int32_t>(r);
  }
  const Scatter job{rows, shape, owner.data(), pixel_order, clip, row_layout(shape, pixel_order),
                    Layout::channels_first(shape)};
  with_float(dtype, "scatter_patches", [&](auto type) {
    using T = decltype(type);
    const int64_t width = shape.width / shape.patch;
    expect_writes(clip, shape.batch * tokens * shape.row() * static_cast<int64_t>(sizeof(T)));
    const auto kernel = VMAE2_PICK(scatter_grid_rows<T>);
    parallel_for(shape.batch * tokens / width, width * shape.row(), threads,
                 [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  });
}

}  // namespace vmae2
