// AdamW on many tensors in one pass over memory. See vmae2_fast/ops/optim.py.
//
// A step reads 16 bytes a parameter and writes 12, 14 with a shadow: it runs at the rate of memory. All tensors are one list of
// pieces, so that a thread does not wait at the end of each of hundreds of small ones.
#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr int64_t kPiece = 1 << 14;  // 64 KiB of each array: many pieces a thread, and long streams for the prefetchers

struct AdamWNumbers {
  float scale;       // factor of the gradient
  float keep;        // factor of the weight: 1 - lr * weight_decay
  float one, two;    // 1 - beta1, 1 - beta2
  float second;      // beta2
  float root, step;  // 1 / sqrt(1 - beta2^t), lr / (1 - beta1^t)
  float eps;
};

struct AdamWPiece {
  size_t tensor;
  int64_t begin;
};

}  // namespace
}  // namespace vmae2

#define VMAE2_KERNELS "adamw_kernels.h"
#include "each_isa.h"

namespace vmae2 {

void adamw(const std::vector<AdamWTensor>& tensors, const AdamW& step, int threads) {
  std::vector<AdamWPiece> pieces;
  std::vector<AdamWNumbers> numbers;
  for (const AdamWTensor& t : tensors) {
    const double now = static_cast<double>(*t.step) + 1;
    numbers.push_back({static_cast<float>(1 / step.scale), static_cast<float>(1 - step.lr * step.weight_decay),
                       static_cast<float>(1 - step.beta1), static_cast<float>(1 - step.beta2),
                       static_cast<float>(step.beta2), static_cast<float>(1 / std::sqrt(1 - std::pow(step.beta2, now))),
                       static_cast<float>(step.lr / (1 - std::pow(step.beta1, now))), static_cast<float>(step.eps)});
    for (int64_t begin = 0; begin < t.count; begin += kPiece) pieces.push_back({numbers.size() - 1, begin});
  }
  const auto update = VMAE2_PICK(adamw_update);
  const auto shadow = VMAE2_PICK(adamw_shadow);
  parallel_for(static_cast<int64_t>(pieces.size()), kPiece, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const AdamWPiece& piece = pieces[static_cast<size_t>(i)];
      AdamWTensor t = tensors[piece.tensor];
      t.count = std::min(kPiece, t.count - piece.begin);
      t.param += piece.begin;
      if (t.shadow != nullptr) t.shadow += piece.begin;
      if (step.skipped) {
        if (t.shadow != nullptr) shadow(t);
        continue;
      }
      t.grad += piece.begin;
      t.exp_avg += piece.begin;
      t.exp_avg_sq += piece.begin;
      update(t, numbers[piece.tensor]);
    }
  });
  if (step.skipped) return;
  for (const AdamWTensor& t : tensors) *t.step += 1;
}

}  // namespace vmae2
