// Kernels of reconstruction.cpp, one instruction set. See each_isa.h.
//
// A token lies flat in order (t, y, x, c), as its prediction does. Vector v of it meets the channels of its lanes in the
// order of vector v % period, so constants and sums of a channel are kept for `period` vectors. P is the period where it is
// known at compile time, else 0.

// Sums for the lanes of a period: in registers, or in memory.
template <int P>
struct Sums {
  Floats at[P];

  VMAE2_INLINE Sums(float*, int64_t) {
    for (int j = 0; j < P; ++j) at[j] = splat(0.0f);
  }
  VMAE2_INLINE void add(int64_t j, Floats value) { at[j] = at[j] + value; }
  VMAE2_INLINE void finish(float* memory) const {
    for (int j = 0; j < P; ++j) store16(memory + 16 * j, at[j]);
  }
};

template <>
struct Sums<0> {
  float* at;

  VMAE2_INLINE Sums(float* memory, int64_t period) : at(memory) { std::memset(at, 0, static_cast<size_t>(64 * period)); }
  VMAE2_INLINE void add(int64_t j, Floats value) { store16(at + 16 * j, load16(at + 16 * j) + value); }
  VMAE2_INLINE void finish(float*) const {}
};

template <int P>
VMAE2_INLINE void add_moments(const Work& work, int64_t v, int64_t j, Sums<P>& first, Sums<P>& second) {
  const Floats z = load16(work.bytes + 16 * v);
  store16(work.block + 16 * v, z);
  first.add(j, z);
  second.add(j, z * z);
}

// Pixels of a token as floats 0..255, zeros up to a whole vector, and their exact sum and sum of squares in every channel: a
// lane adds integers that stay below 2^24, which floats hold exactly, and lanes are added in double.
template <int P>
void read_bytes(const uint8_t* corner, const Job& job, const Work& work) {
  uint8_t* out = work.bytes;
  for (int64_t t = 0; t < job.shape.tubelet; ++t) {
    for (int64_t y = 0; y < job.shape.patch; ++y, out += job.line) {
      copy_short(out, corner + t * job.layout.frame + y * job.layout.line, job.line);
    }
  }
  const int64_t vectors = (job.row + 15) / 16, period = P ? P : job.period, exact = 256 * period;  // 256 * 255^2 < 2^24
  std::fill(work.sum, work.sum + job.shape.channels, 0.0);
  std::fill(work.square, work.square + job.shape.channels, 0.0);
  for (int64_t begin = 0; begin < vectors; begin += exact) {
    const int64_t end = std::min(vectors, begin + exact);
    Sums<P> first(work.first, period), second(work.second, period);
    int64_t v = begin;
    for (; v + period <= end; v += period) {
      for (int64_t j = 0; j < period; ++j) add_moments(work, v + j, j, first, second);
    }
    for (int64_t j = 0; j < period; ++j) {
      if (v + j < end) add_moments(work, v + j, j, first, second);
    }
    first.finish(work.first);
    second.finish(work.second);
    for (int64_t c = 0; c < job.shape.channels; ++c) {
      for (int64_t i = c; i < 16 * period; i += job.shape.channels) {
        work.sum[c] += static_cast<double>(work.first[i]);
        work.square[c] += static_cast<double>(work.second[i]);
      }
    }
  }
}

// Pixels in [0, 1] of a token of a floating point clip, and their moments about the token's first pixel, so that nothing
// cancels.
template <class Pixel>
void read_floats(const Pixel* corner, const Job& job, const Work& work) {
  const int64_t channels = job.shape.channels;
  for (int64_t c = 0; c < channels; ++c) {
    float* out = work.block + c;
    for (int64_t t = 0; t < job.shape.tubelet; ++t) {
      for (int64_t y = 0; y < job.shape.patch; ++y) {
        const Pixel* in = corner + c * job.layout.channel + t * job.layout.frame + y * job.layout.line;
        for (int64_t x = 0; x < job.shape.patch; ++x, out += channels) *out = load(in[x]) * job.std[c] + job.mean[c];
      }
    }
    const double about = static_cast<double>(work.block[c]);
    double sum[8] = {}, square[8] = {};  // several chains, in an order of their own
    int64_t k = 0;
    for (int64_t i = c; i < job.row; i += channels, k = (k + 1) % 8) {
      const double d = static_cast<double>(work.block[i]) - about;
      sum[k] += d;
      square[k] += d * d;
    }
    work.sum[c] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
    work.square[c] = ((square[0] + square[4]) + (square[1] + square[5])) + ((square[2] + square[6]) + (square[3] + square[7]));
  }
}

template <class Pixel, int P>
VMAE2_INLINE void read_token(const Pixel* corner, const Job& job, const Work& work) {
  if constexpr (std::is_same_v<Pixel, uint8_t>) {
    read_bytes<P>(corner, job, work);
  } else {
    read_floats(corner, job, work);
  }
}

// Centre and factor of every channel, target = (pixel - centre) * factor, from the moments.
template <class Pixel>
void channel_constants(const Job& job, const Work& work, float* out) {
  constexpr bool bytes = std::is_same_v<Pixel, uint8_t>;
  constexpr double unit = bytes ? 255.0 : 1.0;
  const double n = static_cast<double>(job.row / job.shape.channels);
  for (int64_t c = 0; c < job.shape.channels; ++c) {
    float &centre = out[c], &factor = out[job.shape.channels + c];
    if (!job.normalize) {
      centre = 0.0f;
      factor = static_cast<float>(1.0 / unit);
      continue;
    }
    const double sum = work.sum[c], spread = n * work.square[c] - sum * sum;
    const double deviation = std::sqrt(std::max(0.0, spread / (n * (n - 1))));
    centre = static_cast<float>((bytes ? 0.0 : static_cast<double>(work.block[c])) + sum / n);
    // (z - mean)/(sd + eps) with z = pixel/unit, multiplied out by unit: no rescaled copy of the pixels.
    factor = static_cast<float>(1.0 / (deviation + kEps * unit));
  }
}

// The constants of every lane of a period.
VMAE2_INLINE void spread_constants(const Job& job, const float* constants, const Work& work) {
  const int64_t channels = job.shape.channels;
  for (int64_t i = 0; i < channels; ++i) {
    work.centre[i] = constants[i];
    work.factor[i] = constants[channels + i];
  }
  for (int64_t i = channels; i < 16 * job.period; ++i) {
    work.centre[i] = work.centre[i - channels];
    work.factor[i] = work.factor[i - channels];
  }
}

VMAE2_INLINE Floats error16(Floats pred, const Work& work, int64_t v, int64_t j) {
  return pred - (load16(work.block + 16 * v) - load16(work.centre + 16 * j)) * load16(work.factor + 16 * j);
}

// Mean squared error of a token.
template <class Pred, int P>
double token_loss(const Pred* pred, const Job& job, const Work& work) {
  const int64_t whole = job.row / 16, rest = job.row % 16, period = P ? P : job.period;
  Sums<P> squares(work.first, period);
  int64_t v = 0;
  for (; v + period <= whole; v += period) {
    for (int64_t j = 0; j < period; ++j) {
      const Floats d = error16(load16(pred + 16 * (v + j)), work, v + j, j);
      squares.add(j, d * d);
    }
  }
  for (int64_t j = 0; j < period; ++j) {
    if (v + j < whole) {
      const Floats d = error16(load16(pred + 16 * (v + j)), work, v + j, j);
      squares.add(j, d * d);
    }
  }
  squares.finish(work.first);
  double sum = 0.0;
  if (rest) {
    const Floats d = error16(load_first(pred + 16 * whole, rest), work, whole, whole % period);
    float last[16];
    store16(last, d * d);
    for (int64_t i = 0; i < rest; ++i) sum += static_cast<double>(last[i]);
  }
  double lanes[8] = {};
  for (int64_t i = 0; i < 16 * period; i += 8) {
    for (int64_t k = 0; k < 8; ++k) lanes[k] += static_cast<double>(work.first[i + k]);
  }
  sum += ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  return sum / static_cast<double>(job.row);
}

template <class Pred, int P>
void token_gradient(const Pred* pred, float scale, Pred* grad, const Job& job, const Work& work) {
  const int64_t whole = job.row / 16, rest = job.row % 16, period = P ? P : job.period;
  const Floats factor = splat(scale);
  int64_t v = 0;
  for (; v + period <= whole; v += period) {
    for (int64_t j = 0; j < period; ++j) {
      const int64_t i = 16 * (v + j);
      store16(grad + i, error16(load16(pred + i), work, v + j, j) * factor);
    }
  }
  for (; v < whole; ++v) store16(grad + 16 * v, error16(load16(pred + 16 * v), work, v, v % period) * factor);
  if (rest) store_first(grad + 16 * v, error16(load_first(pred + 16 * v, rest), work, v, v % period) * factor, rest);
}

template <class Pixel>
VMAE2_INLINE const Pixel* token_of_row(const Job& job, int64_t r) {
  return static_cast<const Pixel*>(job.clip) + job.layout.corner(job.shape, r / job.count, job.index[r]);
}

template <class Pixel, class Pred, int P>
void loss_rows(const Job& job, const Work& work, int64_t begin, int64_t end) {
  const int64_t kept = 2 * job.shape.channels;
  for (int64_t r = begin; r < end; ++r) {
    float* constants = job.statistics + r * kept;
    if (r + 1 < end && job.index[r + 1] >= 0) prefetch_token(token_of_row<Pixel>(job, r + 1), job.shape, job.layout);
    if (job.index[r] < 0) {
      std::fill(constants, constants + kept, 0.0f);
      job.losses[r] = 0.0;
      continue;
    }
    read_token<Pixel, P>(token_of_row<Pixel>(job, r), job, work);
    channel_constants<Pixel>(job, work, constants);
    spread_constants(job, constants, work);
    job.losses[r] = token_loss<Pred, P>(static_cast<const Pred*>(job.pred) + r * job.row, job, work);
  }
}

template <class Pixel, class Pred, int P>
void gradient_rows(const Job& job, const Work& work, int64_t begin, int64_t end) {
  const int64_t kept = 2 * job.shape.channels;
  for (int64_t r = begin; r < end; ++r) {
    Pred* grad = static_cast<Pred*>(job.grad) + r * job.row;
    if (r + 1 < end && job.index[r + 1] >= 0) prefetch_token(token_of_row<Pixel>(job, r + 1), job.shape, job.layout);
    if (job.index[r] < 0) {
      std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(job.row) * sizeof(Pred));
      continue;
    }
    read_token<Pixel, P>(token_of_row<Pixel>(job, r), job, work);
    spread_constants(job, job.statistics + r * kept, work);
    token_gradient<Pred, P>(static_cast<const Pred*>(job.pred) + r * job.row, job.scale, grad, job, work);
  }
}
