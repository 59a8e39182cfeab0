// Target, squared error and its gradient for the loss patches. See vmae2_fast/ops/reconstruction.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr int64_t kMostPairs = 128;  // of vectors that `Moments` adds up: 2 * 128 * 255 < 2^16
constexpr double kEps = 1e-6;  // added to the standard deviation of pixels in [0, 1]

// What the kernels of both directions read and write.
struct Job {
  const void *pred, *clip;
  Clip shape;
  Layout layout;
  const int32_t* index;
  int64_t count, row, line, period;
  const float *mean, *std;
  bool normalize;
  float* statistics;
  double* losses;  // of each row, forward
  float scale;     // of the error, backward
  void* grad;
};

// Scratch of one worker.
struct Work {
  uint8_t *bytes, *other_bytes;  // a token's bytes, zeros up to a whole vector
  float *block, *other_block;    // the pixels of one of a floating point clip, likewise
  float *centre, *factor;        // constants of the lanes of a period
  float* squares;                // sums of the lanes of a period
  uint32_t *byte_sum, *byte_square;
  double *sum, *square;          // of each channel

  Work other() const {
    Work result = *this;
    std::swap(result.bytes, result.other_bytes);
    std::swap(result.block, result.other_block);
    return result;
  }
};

class Scratch {
 public:
  Scratch(const Job& job, int workers) {
    const auto padded = static_cast<size_t>((job.row + 15) / 16 * 16), lanes = static_cast<size_t>(16 * job.period);
    const auto channels = static_cast<size_t>(job.shape.channels), all = static_cast<size_t>(std::max(1, workers));
    // A cache line apart, so that workers do not write into each other's.
    const size_t floats = (2 * padded + 3 * lanes + 31) / 16 * 16, doubles = (2 * channels + 15) / 8 * 8;
    const size_t bytes = 2 * padded + 64;
    floats_.resize(all * floats);
    doubles_.resize(all * doubles);
    bytes_.resize(all * bytes);
    words_.resize(all * 2 * lanes);
    for (size_t w = 0; w < all; ++w) {
      uint8_t* b = bytes_.data() + w * bytes;
      float *f = floats_.data() + w * floats, *l = f + 2 * padded;
      double* d = doubles_.data() + w * doubles;
      uint32_t* words = words_.data() + w * 2 * lanes;
      work_.push_back({b, b + padded, f, f + padded, l, l + lanes, l + 2 * lanes, words, words + lanes, d, d + channels});
    }
  }
  const Work& operator[](int64_t worker) const { return work_[static_cast<size_t>(worker)]; }

 private:
  std::vector<float> floats_;
  std::vector<double> doubles_;
  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> words_;
  std::vector<Work> work_;
};

}  // namespace
}  // namespace vmae2

#define VMAE2_KERNELS "reconstruction_kernels.h"
#include "each_isa.h"

namespace vmae2 {
namespace {

Job prepare(const char* op, const Reconstruction& in) {
  const Clip& s = in.shape;
  check_clip(op, s);
  check_index(op, in.index, s.batch, in.count, s.tokens());
  const auto channels = static_cast<size_t>(s.channels);
  if (in.mean.size() != channels || in.std.size() != channels) {
    throw std::invalid_argument(std::string(op) + ": mean and std need one value a channel");
  }
  Job job{};
  job.pred = in.pred;
  job.clip = in.clip;
  job.shape = s;
  job.layout = Layout::of(in.clip_dtype, s);
  job.index = in.index;
  job.count = in.count;
  job.row = s.row();
  job.line = s.patch * s.channels;
  const int64_t least = s.channels / std::gcd(s.channels, int64_t{16});
  job.period = least == 1 ? 4 : least;  // several independent sums also where one vector would do
  job.mean = in.mean.data();
  job.std = in.std.data();
  return job;
}

float divided_by(int64_t divisor, int64_t count) {
  return static_cast<float>(divisor ? divisor : std::max<int64_t>(1, count));
}

// Run pick(pixel, pred, period), a kernel of these types, over all rows.
template <class Pick>
void run_rows(const char* op, const Reconstruction& in, const Job& job, int threads, const Pick& pick) {
  const Scratch scratch(job, threads);
  with_pixel(in.clip_dtype, op, [&](auto pixel) {
    with_float(in.pred_dtype, op, [&](auto pred) {
      const auto run = [&](auto period) {
        const auto kernel = pick(pixel, pred, period);
        parallel_slices(in.shape.batch * in.count, 4 * job.row, threads,
                        [&](int64_t begin, int64_t end, int64_t worker) { kernel(job, scratch[worker], begin, end); });
      };
      switch (job.period) {
        case 3: return run(std::integral_constant<int, 3>{});
        case 4: return run(std::integral_constant<int, 4>{});
        default: return run(std::integral_constant<int, 0>{});
      }
    });
  });
}

}  // namespace

void reconstruction_loss(const Reconstruction& in, bool normalize, int64_t divisor, float* statistics, float* loss,
                         int64_t* count_out, int threads) {
  Job job = prepare("reconstruction_loss", in);
  if (normalize && job.row / in.shape.channels < 2) {
    throw std::invalid_argument("reconstruction_loss: a patch of one pixel has no variance");
  }
  const int64_t rows = in.shape.batch * in.count;
  // One loss a row, added up in row order below: the sum does not depend on the number of threads.
  std::vector<double> losses(static_cast<size_t>(rows));
  job.normalize = normalize;
  job.statistics = statistics;
  job.losses = losses.data();
  run_rows("reconstruction_loss", in, job, threads, [](auto pixel, auto pred, auto period) {
    return VMAE2_PICK(loss_rows<decltype(pixel), decltype(pred), decltype(period)::value>);
  });
  double sum = 0;
  int64_t valid = 0;
  for (int64_t r = 0; r < rows; ++r) {
    sum += losses[static_cast<size_t>(r)];
    valid += in.index[r] >= 0;
  }
  *loss = static_cast<float>(sum) / divided_by(divisor, valid);
  *count_out = valid;
}

void reconstruction_loss_backward(const float* upstream, const Reconstruction& in, const float* statistics,
                                  const int64_t* count, int64_t divisor, void* grad, int threads) {
  Job job = prepare("reconstruction_loss_backward", in);
  job.statistics = const_cast<float*>(statistics);
  const float of_sum = *upstream / divided_by(divisor, *count);
  job.scale = static_cast<float>(static_cast<double>(of_sum) * 2.0 / static_cast<double>(job.row));
  job.grad = grad;
  expect_writes(grad, in.shape.batch * in.count * job.row * (in.pred_dtype == Dtype::f32 ? 4 : 2));
  run_rows("reconstruction_loss_backward", in, job, threads, [](auto pixel, auto pred, auto period) {
    return VMAE2_PICK(gradient_rows<decltype(pixel), decltype(pred), decltype(period)::value>);
  });
}

}  // namespace vmae2
