// Residual stream and LayerNorm, forward and backward. See vmae2_fast/ops/norm.py.
//
// A row is read from memory once and stays in the nearest cache for the passes that follow. What rows give the parameters is
// added up by spans of rows that depend on the shape only, then span by span: the same bits on any number of threads.
#include <algorithm>
#include <memory>

#include "dispatch.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr int64_t kSpan = 16;    // rows that share their lines of sums, at least
constexpr int64_t kSpans = 64;   // at most: enough for the threads of a socket, few beside the rows
constexpr int64_t kBuffers = 3;  // rows of floats that a worker needs

std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]); }

}  // namespace
}  // namespace vmae2

#define VMAE2_KERNELS "norm_kernels.h"
#include "each_isa.h"

namespace vmae2 {

void residual_norm(const ResidualNorm& in, const ResidualNormResults& out, int threads) {
  const auto buffers = floats(std::max(1, threads) * kBuffers * in.columns);
  const auto kernel = VMAE2_PICK(norm_rows);
  parallel_slices(in.batch * in.tokens, in.columns, threads, [&](int64_t begin, int64_t end, int64_t worker) {
    kernel(in, out, buffers.get() + worker * kBuffers * in.columns, begin, end);
  });
}

void residual_norm_backward(const ResidualNorm& in, const ResidualNormGradients& out, int threads) {
  const int64_t rows = in.batch * in.tokens, columns = in.columns;
  const int64_t span = std::max(kSpan, (rows + kSpans - 1) / kSpans), spans = (rows + span - 1) / span;
  const int64_t width = (columns + 15) / 16 * 16, stride = 3 * width;  // for norm weight, norm bias and gamma
  const auto lines = floats(spans * stride);
  const auto buffers = floats(std::max(1, threads) * kBuffers * columns);
  const auto kernel = VMAE2_PICK(norm_rows_backward);
  const auto add = VMAE2_PICK(add_lines);
  parallel_slices(spans, span * columns, threads, [&](int64_t begin, int64_t end, int64_t worker) {
    for (int64_t i = begin; i < end; ++i) {
      kernel(in, out, lines.get() + i * stride, width, buffers.get() + worker * kBuffers * columns, i * span,
             std::min(rows, (i + 1) * span));
    }
  });
  const float* line = lines.get();
  for (float* sum : {out.dweight, out.dbias, out.dgamma}) {
    if (sum != nullptr) {
      parallel_for(width / 16, 16 * spans, threads, [&](int64_t begin, int64_t end) {
        add(line, spans, stride, sum, 16 * begin, std::min(columns, 16 * end));
      });
    }
    line += width;
  }
}

}  // namespace vmae2
