// Target, squared error and its gradient for the loss patches. See vmae2_fast/ops/reconstruction.py.
//
// A "lane" is one of the patch*channels places of a line in order (x, c): clip and prediction are walked line by line, so
// the same lane always belongs to the same channel and all inner loops run over lanes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>

#include "dispatch.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr double kEps = 1e-6;  // added to the standard deviation of pixels in [0, 1]

// What one thread needs to turn a token into a loss and an error row.
template <class Pixel>
struct Worker {
  static constexpr bool bytes = std::is_same_v<Pixel, uint8_t>;
  const Clip& shape;
  const Layout layout;
  const float *mean, *std;
  const bool normalize;
  const int64_t lanes, lines;
  std::vector<float> block;            // pixels of the token as float: bytes as 0..255, others in [0, 1]
  std::vector<float> centre, inverse;  // per lane: target = (pixel - centre) * inverse
  std::vector<double> first, second;   // per lane sums
  std::vector<float> squares;          // per lane sum of squared errors

  Worker(const Clip& s, Dtype dtype, const float* mean_, const float* std_, bool normalize_)
      : shape(s), layout(Layout::of(dtype, s)), mean(mean_), std(std_), normalize(normalize_),
        lanes(s.patch * s.channels), lines(s.tubelet * s.patch), block(static_cast<size_t>(lines * lanes)),
        centre(static_cast<size_t>(lanes), 0.0f), inverse(static_cast<size_t>(lanes), bytes ? 1.0f / 255.0f : 1.0f),
        first(static_cast<size_t>(lanes)), second(static_cast<size_t>(lanes)), squares(static_cast<size_t>(lanes)) {}

  void read(const Pixel* corner) {
    float* out = block.data();
    for (int64_t t = 0; t < shape.tubelet; ++t) {
      for (int64_t y = 0; y < shape.patch; ++y, out += lanes) {
        const Pixel* in = corner + t * layout.frame + y * layout.line;
        if constexpr (bytes) {
          for (int64_t i = 0; i < lanes; ++i) out[i] = load(in[i]);
        } else {
          for (int64_t c = 0; c < shape.channels; ++c) {
            for (int64_t x = 0; x < shape.patch; ++x) out[x * shape.channels + c] = load(in[c * layout.channel + x]) * std[c] + mean[c];
          }
        }
      }
    }
  }

  // Mean and unbiased variance of each channel in double, about a pixel of the token so that nothing cancels.
  void statistics() {
    std::fill(first.begin(), first.end(), 0.0);
    std::fill(second.begin(), second.end(), 0.0);
    const int64_t channels = shape.channels;
    for (int64_t i = 0; i < lanes; ++i) centre[static_cast<size_t>(i)] = block[static_cast<size_t>(i % channels)];
    for (int64_t l = 0; l < lines; ++l) {
      const float* in = block.data() + l * lanes;
      for (int64_t i = 0; i < lanes; ++i) {
        const double d = static_cast<double>(in[i]) - static_cast<double>(centre[static_cast<size_t>(i)]);
        first[static_cast<size_t>(i)] += d;
        second[static_cast<size_t>(i)] += d * d;
      }
    }
    const double n = static_cast<double>(lines * shape.patch), unit = bytes ? 255.0 : 1.0;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, square = 0;
      for (int64_t i = c; i < lanes; i += channels) {
        sum += first[static_cast<size_t>(i)];
        square += second[static_cast<size_t>(i)];
      }
      const double variance = std::max(0.0, (square - sum * sum / n) / (n - 1));
      const double middle = static_cast<double>(centre[static_cast<size_t>(c)]) + sum / n;
      // (z - mean)/(sd + eps) with z = pixel/unit, multiplied out by unit: no rescaled copy of the pixels.
      const double factor = 1.0 / (std::sqrt(variance) + kEps * unit);
      for (int64_t i = c; i < lanes; i += channels) {
        centre[static_cast<size_t>(i)] = static_cast<float>(middle);
        inverse[static_cast<size_t>(i)] = static_cast<float>(factor);
      }
    }
  }

  // Centre and factor of each channel out to, or in from, what the op keeps for its backward.
  void keep(float* statistics) const {
    for (int64_t c = 0; c < shape.channels; ++c) {
      statistics[c] = centre[static_cast<size_t>(c)];
      statistics[shape.channels + c] = inverse[static_cast<size_t>(c)];
    }
  }
  void restore(const float* statistics) {
    for (int64_t i = 0; i < lanes; ++i) {
      centre[static_cast<size_t>(i)] = statistics[i % shape.channels];
      inverse[static_cast<size_t>(i)] = statistics[shape.channels + i % shape.channels];
    }
  }

  template <class Pred>
  double loss(const Pred* pred) {
    std::fill(squares.begin(), squares.end(), 0.0f);
    const float *c = centre.data(), *v = inverse.data();
    float* s = squares.data();
    for (int64_t l = 0; l < lines; ++l) {
      const float* z = block.data() + l * lanes;
      for (int64_t i = 0; i < lanes; ++i) {
        const float d = load(pred[l * lanes + i]) - (z[i] - c[i]) * v[i];
        s[i] += d * d;
      }
    }
    double sum = 0;
    for (int64_t i = 0; i < lanes; ++i) sum += static_cast<double>(s[i]);
    return sum / static_cast<double>(lines * lanes);
  }

  template <class Pred>
  void gradient(const Pred* pred, float scale, Pred* grad) const {
    const float *c = centre.data(), *v = inverse.data();
    for (int64_t l = 0; l < lines; ++l) {
      const float* z = block.data() + l * lanes;
      for (int64_t i = 0; i < lanes; ++i) {
        store(grad[l * lanes + i], (load(pred[l * lanes + i]) - (z[i] - c[i]) * v[i]) * scale);
      }
    }
  }
};

// Call body(worker, row, prediction's type, clip's corner of the row or nullptr where it is padding) for every row, on threads.
template <class Body>
void for_rows(const char* op, const Reconstruction& in, bool normalize, int threads, const Body& body) {
  const Clip& shape = in.shape;
  check_clip(op, shape);
  check_index(op, in.index, shape.batch, in.count, shape.tokens());
  const auto channels = static_cast<size_t>(shape.channels);
  if (in.mean.size() != channels || in.std.size() != channels || (normalize && shape.tubelet * shape.patch * shape.patch < 2)) {
    throw std::invalid_argument(std::string(op) + ": mean and std need one value a channel, a patch more than one pixel");
  }
  const int64_t rows = shape.batch * in.count;
  with_pixel(in.clip_dtype, op, [&](auto pixel_type) {
    with_float(in.pred_dtype, op, [&](auto pred_type) {
      using Pixel = decltype(pixel_type);
      // One worker a slice of rows: scratch is allocated before threads start, where a failure can still be reported.
      const int64_t slices = std::max<int64_t>(1, std::min<int64_t>(rows, 4 * static_cast<int64_t>(std::max(1, threads))));
      std::vector<Worker<Pixel>> workers(static_cast<size_t>(slices),
                                         Worker<Pixel>(shape, in.clip_dtype, in.mean.data(), in.std.data(), normalize));
      parallel_for(slices, rows * shape.row() * 4 / slices, threads, [&](int64_t begin, int64_t end) {
        for (int64_t slice = begin; slice < end; ++slice) {
          Worker<Pixel>& worker = workers[static_cast<size_t>(slice)];
          for (int64_t r = rows * slice / slices; r < rows * (slice + 1) / slices; ++r) {
            const Pixel* corner = nullptr;
            if (in.index[r] >= 0) corner = static_cast<const Pixel*>(in.clip) + worker.layout.corner(shape, r / in.count, in.index[r]);
            body(worker, r, pred_type, corner);
          }
        }
      });
    });
  });
}

}  // namespace

void reconstruction_loss(const Reconstruction& in, bool normalize, float* statistics, float* loss_sum, int64_t* count_out,
                         int threads) {
  const int64_t rows = in.shape.batch * in.count, row = in.shape.row(), kept = 2 * in.shape.channels;
  // One loss a row, added up in row order below: the sum does not depend on the number of threads.
  std::vector<double> losses(static_cast<size_t>(std::max<int64_t>(rows, 0)), 0.0);
  for_rows("reconstruction_loss", in, normalize, threads, [&](auto& worker, int64_t r, auto type, const auto* corner) {
    float* out = statistics + r * kept;
    if (corner == nullptr) return std::fill(out, out + kept, 0.0f);
    worker.read(corner);
    if (normalize) worker.statistics();
    worker.keep(out);
    losses[static_cast<size_t>(r)] = worker.loss(static_cast<const decltype(type)*>(in.pred) + r * row);
  });
  double sum = 0;
  int64_t valid = 0;
  for (int64_t r = 0; r < rows; ++r) {
    sum += losses[static_cast<size_t>(r)];
    valid += in.index[r] >= 0;
  }
  *loss_sum = static_cast<float>(sum);
  *count_out = valid;
}

void reconstruction_loss_backward(const float* upstream, const Reconstruction& in, const float* statistics, void* grad,
                                  int threads) {
  const int64_t row = in.shape.row(), kept = 2 * in.shape.channels;
  const auto scale = static_cast<float>(static_cast<double>(*upstream) * 2.0 / static_cast<double>(row));
  for_rows("reconstruction_loss_backward", in, false, threads, [&](auto& worker, int64_t r, auto type, const auto* corner) {
    auto* out = static_cast<decltype(type)*>(grad) + r * row;
    if (corner == nullptr) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(row) * sizeof(*out));
      return;
    }
    worker.read(corner);
    worker.restore(statistics + r * kept);
    worker.gradient(static_cast<const decltype(type)*>(in.pred) + r * row, scale, out);
  });
}

}  // namespace vmae2
