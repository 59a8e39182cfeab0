// Kernels of norm.cpp, one instruction set. See each_isa.h.
//
// The passes over a row take floats. Rows of another dtype are widened into a buffer in the nearest cache, and what they become
// is rounded from one.

template <class In, class Out>
VMAE2_INLINE void convert_row(const In* in, Out* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, load16(in + i));
  if (i < n) store_first(out + i, load_first(in + i, n - i), n - i);
}

// Row `row` as floats: where it lies, or widened into `buffer`.
const float* read_row(const void* rows, Dtype dtype, int64_t row, int64_t n, float* buffer) {
  if (dtype == Dtype::f32) return static_cast<const float*>(rows) + row * n;
  if (dtype == Dtype::bf16) {
    convert_row(static_cast<const bf16*>(rows) + row * n, buffer, n);
  } else {
    convert_row(static_cast<const f16*>(rows) + row * n, buffer, n);
  }
  return buffer;
}

// Where the floats of a row are to be written: into the row, or into `buffer`, from where `finish_row` rounds them.
float* write_row(void* rows, Dtype dtype, int64_t row, int64_t n, float* buffer) {
  return dtype == Dtype::f32 ? static_cast<float*>(rows) + row * n : buffer;
}

void finish_row(void* rows, Dtype dtype, int64_t row, int64_t n, const float* buffer) {
  if (dtype == Dtype::bf16) convert_row(buffer, static_cast<bf16*>(rows) + row * n, n);
  if (dtype == Dtype::f16) convert_row(buffer, static_cast<f16*>(rows) + row * n, n);
}

// Sums of lanes, and sums of these in an order that no instruction set changes. Two vectors, or each addition would wait for
// the one before it.
struct LaneSum {
  Floats even, odd;

  VMAE2_INLINE LaneSum() { even = odd = splat(0); }
  VMAE2_INLINE float total() const {
    float lanes[16];
    store16(lanes, even + odd);
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
};

// out = x + branch * factor (times gamma), the new stream.
template <bool GAMMA>
void add_branch(const float* x, const float* branch, float factor, const float* gamma, float* out, int64_t n) {
  const Floats drop = splat(factor);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    store16(out + i, load16(x + i) + load16(branch + i) * (GAMMA ? drop * load16(gamma + i) : drop));
  }
  if (const int64_t left = n - i; left > 0) {
    const Floats scale = GAMMA ? drop * load_first(gamma + i, left) : drop;
    store_first(out + i, load_first(x + i, left) + load_first(branch + i, left) * scale, left);
  }
}

float mean_of(const float* x, int64_t n) {
  LaneSum sum;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    sum.even = sum.even + load16(x + i);
    sum.odd = sum.odd + load16(x + i + 16);
  }
  for (; i < n; i += 16) sum.even = sum.even + (i + 16 <= n ? load16(x + i) : load_first(x + i, n - i));
  return sum.total() / static_cast<float>(n);
}

float variance_of(const float* x, float mean, int64_t n) {
  LaneSum sum;
  const Floats centre = splat(mean);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const Floats a = load16(x + i) - centre, b = load16(x + i + 16) - centre;
    sum.even = sum.even + a * a;
    sum.odd = sum.odd + b * b;
  }
  for (; i < n; i += 16) {
    Floats a = splat(0);
    if (i + 16 <= n) {
      a = load16(x + i) - centre;
    } else {
      float centred[16] = {};  // behind the row is no deviation
      store_first(centred, load_first(x + i, n - i) - centre, n - i);
      a = load16(centred);
    }
    sum.even = sum.even + a * a;
  }
  return sum.total() / static_cast<float>(n);
}

void normalise(const float* x, float mean, float rstd, const float* weight, const float* bias, float* out, int64_t n) {
  const Floats centre = splat(mean), scale = splat(rstd);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, (load16(x + i) - centre) * scale * load16(weight + i) + load16(bias + i));
  if (const int64_t left = n - i; left > 0) {
    const Floats normed = (load_first(x + i, left) - centre) * scale;
    store_first(out + i, normed * load_first(weight + i, left) + load_first(bias + i, left), left);
  }
}

// Rows [begin, end). buffers: [kBuffers, columns].
void norm_rows(const ResidualNorm& in, const ResidualNormResults& out, float* buffers, int64_t begin, int64_t end) {
  const int64_t n = in.columns;
  float *first = buffers, *second = buffers + n;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = read_row(in.x, in.x_dtype, row, n, first);
    if (in.branch != nullptr) {
      const float* branch = read_row(in.branch, in.branch_dtype, row, n, second);
      const float factor = in.drop == nullptr ? 1.0f : in.drop[row / in.tokens];
      float* sum = write_row(out.x_new, in.x_dtype, row, n, first);
      if (in.gamma == nullptr) {
        add_branch<false>(x, branch, factor, nullptr, sum, n);
      } else {
        add_branch<true>(x, branch, factor, in.gamma, sum, n);
      }
      finish_row(out.x_new, in.x_dtype, row, n, sum);
      x = read_row(out.x_new, in.x_dtype, row, n, first);  // the norm sees the stream as it goes on, rounded
    }
    const float mean = mean_of(x, n), rstd = 1.0f / std::sqrt(variance_of(x, mean, n) + out.eps);
    float* h = write_row(out.h, out.h_dtype, row, n, second);
    normalise(x, mean, rstd, in.weight, in.bias, h, n);
    finish_row(out.h, out.h_dtype, row, n, h);
    out.mean[row] = mean;
    out.rstd[row] = rstd;
  }
}

// The pass that adds up what a row gives norm weight and bias, and the two means that its own gradient needs. Lines of sums, or
// null where nobody wants them, both or neither.
template <bool SUMS>
VMAE2_INLINE void meet_lanes(Floats x, Floats grad, Floats weight, Floats mean, Floats rstd, float* dweight, float* dbias,
                             Floats& level, Floats& slope) {
  const Floats normed = (x - mean) * rstd;
  if (SUMS) {
    store16(dweight, load16(dweight) + grad * normed);
    store16(dbias, load16(dbias) + grad);
  }
  grad = grad * weight;
  level = level + grad;
  slope = slope + grad * normed;
}

template <bool SUMS>
void meet_row(const float* x, const float* grad, const float* weight, float mean_, float rstd_, float* dweight, float* dbias,
              float* level, float* slope, int64_t n) {
  const Floats mean = splat(mean_), rstd = splat(rstd_);
  LaneSum levels, slopes;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    meet_lanes<SUMS>(load16(x + i), load16(grad + i), load16(weight + i), mean, rstd, dweight + i, dbias + i, levels.even,
                     slopes.even);
    meet_lanes<SUMS>(load16(x + i + 16), load16(grad + i + 16), load16(weight + i + 16), mean, rstd, dweight + i + 16,
                     dbias + i + 16, levels.odd, slopes.odd);
  }
  // Lines of sums end with a whole vector. Zeros behind a row of gradients add nothing, unless mean * rstd is infinite.
  for (; i < n; i += 16) {
    const int64_t left = std::min<int64_t>(16, n - i);
    meet_lanes<SUMS>(load_first(x + i, left), load_first(grad + i, left), load_first(weight + i, left), mean, rstd, dweight + i,
                     dbias + i, levels.even, slopes.even);
  }
  *level = levels.total() / static_cast<float>(n);
  *slope = slopes.total() / static_cast<float>(n);
}

// The gradient of the stream before the branch was added.
VMAE2_INLINE Floats stream_gradient(Floats x, Floats grad, Floats weight, Floats mean, Floats rstd, Floats level, Floats slope) {
  return (grad * weight - (x - mean) * rstd * slope - level) * rstd;
}

void stream_row(const float* x, const float* grad, const float* weight, float mean_, float rstd_, float level_, float slope_,
                const float* grad_x, float* dx, int64_t n) {
  const Floats mean = splat(mean_), rstd = splat(rstd_), level = splat(level_), slope = splat(slope_);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    Floats d = stream_gradient(load16(x + i), load16(grad + i), load16(weight + i), mean, rstd, level, slope);
    if (grad_x != nullptr) d = d + load16(grad_x + i);
    store16(dx + i, d);
  }
  if (const int64_t left = n - i; left > 0) {
    Floats d = stream_gradient(load_first(x + i, left), load_first(grad + i, left), load_first(weight + i, left), mean, rstd,
                               level, slope);
    if (grad_x != nullptr) d = d + load_first(grad_x + i, left);
    store_first(dx + i, d, left);
  }
}

// dgamma += dx * branch * factor; the line ends with a whole vector.
void gamma_row(const float* dx, const float* branch, float factor, float* dgamma, int64_t n) {
  const Floats drop = splat(factor);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(dgamma + i, load16(dgamma + i) + load16(dx + i) * drop * load16(branch + i));
  if (const int64_t left = n - i; left > 0) {
    store16(dgamma + i, load16(dgamma + i) + load_first(dx + i, left) * drop * load_first(branch + i, left));
  }
}

// out = dx * factor (times gamma), the branch's gradient.
template <bool GAMMA>
void branch_row(const float* dx, float factor, const float* gamma, float* out, int64_t n) {
  const Floats drop = splat(factor);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, load16(dx + i) * (GAMMA ? drop * load16(gamma + i) : drop));
  if (const int64_t left = n - i; left > 0) {
    store_first(out + i, load_first(dx + i, left) * (GAMMA ? drop * load_first(gamma + i, left) : drop), left);
  }
}

// Rows [begin, end), which share the lines of sums at `lines`, each `width` long. buffers: [kBuffers, columns].
void norm_rows_backward(const ResidualNorm& in, const ResidualNormGradients& out, float* lines, int64_t width, float* buffers,
                        int64_t begin, int64_t end) {
  const int64_t n = in.columns;
  float *first = buffers, *second = buffers + n, *third = buffers + 2 * n;
  float *dweight = lines, *dbias = lines + width, *dgamma = lines + 2 * width;
  for (int64_t i = 0; i < 3 * width; i += 16) store16(lines + i, splat(0));
  const bool sums = out.dweight != nullptr || out.dbias != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const float *x = read_row(in.x, in.x_dtype, row, n, first), *grad = read_row(out.grad_h, out.grad_dtype, row, n, second);
    const float mean = out.mean[row], rstd = out.rstd[row];
    float level, slope;
    if (sums) {
      meet_row<true>(x, grad, in.weight, mean, rstd, dweight, dbias, &level, &slope, n);
    } else {
      meet_row<false>(x, grad, in.weight, mean, rstd, nullptr, nullptr, &level, &slope, n);
    }
    const float* grad_x = out.grad_x == nullptr ? nullptr : read_row(out.grad_x, in.x_dtype, row, n, third);
    float* dx = write_row(out.dx, in.x_dtype, row, n, first);
    stream_row(x, grad, in.weight, mean, rstd, level, slope, grad_x, dx, n);
    finish_row(out.dx, in.x_dtype, row, n, dx);
    const float factor = in.drop == nullptr ? 1.0f : in.drop[row / in.tokens];
    if (out.dgamma != nullptr) gamma_row(dx, read_row(in.branch, in.branch_dtype, row, n, second), factor, dgamma, n);
    if (out.dbranch == nullptr) continue;
    float* dbranch = write_row(out.dbranch, in.branch_dtype, row, n, second);
    if (in.gamma == nullptr) {
      branch_row<false>(dx, factor, nullptr, dbranch, n);
    } else {
      branch_row<true>(dx, factor, in.gamma, dbranch, n);
    }
    finish_row(out.dbranch, in.branch_dtype, row, n, dbranch);
  }
}

// sum[i] = the sum of lines[.][i], i in [begin, end); lines are `stride` apart.
void add_lines(const float* lines, int64_t count, int64_t stride, float* sum, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 16) {
    Floats total = splat(0);
    for (int64_t k = 0; k < count; ++k) total = total + load16(lines + k * stride + i);  // lines end with a whole vector
    store_first(sum + i, total, std::min<int64_t>(16, end - i));
  }
}
