// RoIAlign and the maximum over its bins. See vmae2_fast/ops/roi_align.py.
//
// A bin has a few taps along each axis. For every row of bins the taps along y make one line of the box's columns, a block of
// channels wide, which stays in the first cache while the taps along x make the bins of it; only their maximum is written.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr int64_t kRoiLanes = 64;  // channels of a block

// The taps of one box along one axis: bin p has weight[p*length + cell] for the cells first[p] .. last[p].
struct RoiTaps {
  const float* weight;
  const int64_t *first, *last;
  int64_t begin, end;  // the cells of all bins
};

// Of all boxes.
struct RoiAxis {
  int64_t bins, length;
  std::vector<float> weight;
  std::vector<int64_t> first, last, begin, end;

  RoiAxis(const RoiAlign& in, int64_t low, int64_t high, int64_t cells) : bins(in.size), length(cells) {
    const auto all = static_cast<size_t>(in.count * bins);
    weight.assign(all * static_cast<size_t>(length), 0.0f);
    first.assign(all, 0);
    last.assign(all, 0);
    begin.assign(static_cast<size_t>(in.count), 0);
    end.assign(static_cast<size_t>(in.count), 0);
    for (int64_t box = 0; box < in.count; ++box) add(in, box, in.boxes[box * 5 + low], in.boxes[box * 5 + high]);
  }

  RoiTaps of(int64_t box) const {
    return {weight.data() + box * bins * length, first.data() + box * bins, last.data() + box * bins,
            begin[static_cast<size_t>(box)], end[static_cast<size_t>(box)]};
  }

 private:
  void add(const RoiAlign& in, int64_t box, float low, float high) {
    const float offset = in.aligned ? 0.5f : 0.0f, start = low * in.scale - offset;
    float extent = high * in.scale - offset - start;
    if (!in.aligned) extent = std::max(extent, 1.0f);
    const float bin = extent / static_cast<float>(bins);
    const float samples = in.sampling > 0 ? static_cast<float>(in.sampling) : std::max(std::ceil(bin), 0.0f);
    const auto top = static_cast<float>(length - 1);
    int64_t lowest = length, highest = 0;
    for (int64_t p = 0; p < bins; ++p) {
      float* row = weight.data() + (box * bins + p) * length;
      int64_t from = length, to = 0;
      for (float i = 0; i < samples; i += 1.0f) {
        const float place = start + static_cast<float>(p) * bin + (i + 0.5f) * bin / samples;
        if (!(place >= -1.0f && place <= static_cast<float>(length))) continue;
        const float clamped = std::min(std::max(place, 0.0f), top);
        const auto cell = static_cast<int64_t>(clamped);
        const float fraction = clamped - static_cast<float>(cell);
        row[cell] += 1.0f - fraction;
        if (fraction > 0.0f) row[cell + 1] += fraction;
        from = std::min(from, cell);
        to = std::max(to, cell + (fraction > 0.0f ? 2 : 1));
      }
      if (from >= to) continue;
      for (int64_t cell = from; cell < to; ++cell) row[cell] /= samples;
      first[static_cast<size_t>(box * bins + p)] = from;
      last[static_cast<size_t>(box * bins + p)] = to;
      lowest = std::min(lowest, from);
      highest = std::max(highest, to);
    }
    if (lowest < highest) {
      begin[static_cast<size_t>(box)] = lowest;
      end[static_cast<size_t>(box)] = highest;
    }
  }
};

std::vector<int64_t> images_of(const RoiAlign& in) {
  if (in.batch < 0 || in.height < 1 || in.width < 1 || in.channels < 1 || in.size < 1 || in.size > 16) {
    throw std::invalid_argument("roi_align_max: features and bins must not be empty, and a side has at most 16 bins");
  }
  std::vector<int64_t> image(static_cast<size_t>(in.count));
  for (int64_t box = 0; box < in.count; ++box) {
    const float* row = in.boxes + box * 5;
    for (int i = 0; i < 5; ++i) {
      if (!std::isfinite(row[i])) throw std::invalid_argument("roi_align_max: box " + std::to_string(box) + " is not finite");
    }
    const auto named = static_cast<int64_t>(row[0]);
    if (named < 0 || named >= in.batch) {
      throw std::out_of_range("roi_align_max: a box names clip " + std::to_string(named) + " of a batch of " +
                              std::to_string(in.batch));
    }
    image[static_cast<size_t>(box)] = named;
  }
  return image;
}

struct RoiMax {
  const RoiAlign& in;
  const RoiAxis &y, &x;
  const int64_t* image;
  int64_t blocks;
  void* pooled;
  uint8_t* where;
};

// Gradients of the blocks [begin, end) of channels; one accumulator a block, so no two threads meet.
template <class T>
void roi_gradient(const RoiMax& job, const T* grad, T* out, int64_t begin, int64_t end) {
  const RoiAlign& in = job.in;
  const int64_t cells = in.height * in.width;
  std::vector<float> sums(static_cast<size_t>(cells * kRoiLanes));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / job.blocks, first = item % job.blocks * kRoiLanes;
    const int64_t lanes = std::min<int64_t>(kRoiLanes, in.channels - first);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t box = 0; box < in.count; ++box) {
      if (job.image[box] != image) continue;
      const RoiTaps y = job.y.of(box), x = job.x.of(box);
      for (int64_t c = 0; c < lanes; ++c) {
        const int64_t at = box * in.channels + first + c, p = job.where[at] / in.size, q = job.where[at] % in.size;
        const float value = load(grad[at]);
        for (int64_t row = y.first[p]; row < y.last[p]; ++row) {
          const float share = value * y.weight[p * in.height + row];
          float* line = sums.data() + row * in.width * kRoiLanes + c;
          for (int64_t column = x.first[q]; column < x.last[q]; ++column) {
            line[column * kRoiLanes] += share * x.weight[q * in.width + column];
          }
        }
      }
    }
    for (int64_t cell = 0; cell < cells; ++cell) {
      T* to = out + (image * cells + cell) * in.channels + first;
      for (int64_t c = 0; c < lanes; ++c) store(to[c], sums[static_cast<size_t>(cell * kRoiLanes + c)]);
    }
  }
}

}  // namespace
}  // namespace vmae2

#define VMAE2_KERNELS "roi_align_kernels.h"
#include "each_isa.h"

namespace vmae2 {

void roi_align_max(const RoiAlign& in, void* pooled, uint8_t* where, int threads) {
  const std::vector<int64_t> image = images_of(in);
  const RoiAxis y(in, 2, 4, in.height), x(in, 1, 3, in.width);
  const RoiMax job{in, y, x, image.data(), (in.channels + kRoiLanes - 1) / kRoiLanes, pooled, where};
  with_float(in.dtype, "roi_align_max", [&](auto type) {
    const auto kernel = VMAE2_PICK(roi_max<decltype(type)>);
    parallel_for(in.count * job.blocks, kRoiLanes * in.size * (in.width + 3 * in.size), threads,
                 [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  });
}

void roi_align_max_backward(const RoiAlign& in, const void* grad, const uint8_t* where, void* out, int threads) {
  const std::vector<int64_t> image = images_of(in);
  for (int64_t i = 0; i < in.count * in.channels; ++i) {
    if (where[i] >= in.size * in.size) throw std::out_of_range("roi_align_max: a maximum lies in no bin");
  }
  const RoiAxis y(in, 2, 4, in.height), x(in, 1, 3, in.width);
  const RoiMax job{in, y, x, image.data(), (in.channels + kRoiLanes - 1) / kRoiLanes, nullptr, const_cast<uint8_t*>(where)};
  with_float(in.dtype, "roi_align_max_backward", [&](auto type) {
    using T = decltype(type);
    const int64_t cost = kRoiLanes * (in.height * in.width + 12 * in.count / std::max<int64_t>(1, in.batch));
    parallel_for(in.batch * job.blocks, cost, threads, [&](int64_t begin, int64_t end) {
      roi_gradient(job, static_cast<const T*>(grad), static_cast<T*>(out), begin, end);
    });
  });
}

}  // namespace vmae2
