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

// The token's bytes in one piece, zeros up to a whole vector.
VMAE2_INLINE void read_bytes(const uint8_t* corner, const Job& job, const Work& work) {
  uint8_t* out = work.bytes;
  for (int64_t t = 0; t < job.shape.tubelet; ++t) {
    for (int64_t y = 0; y < job.shape.patch; ++y, out += job.line) {
      copy_short(out, corner + t * job.layout.frame + y * job.layout.line, job.line);
    }
  }
}

// Exact sum and sum of squares of the bytes of every channel.
template <int P>
void add_bytes(const Job& job, const Work& work) {
  static const uint8_t none[16] = {};
  const int64_t channels = job.shape.channels, vectors = (job.row + 15) / 16, period = P ? P : job.period;
  std::fill(work.sum, work.sum + channels, 0.0);
  std::fill(work.square, work.square + channels, 0.0);
  for (int64_t begin = 0; begin < vectors; begin += 2 * kMostPairs * period) {
    const int64_t end = std::min(vectors, begin + 2 * kMostPairs * period);
    for (int64_t j = 0; j < period; ++j) {
      Moments moments;
      int64_t v = begin + j;
      for (; v + period < end; v += 2 * period) moments.add(work.bytes + 16 * v, work.bytes + 16 * (v + period));
      if (v < end) moments.add(work.bytes + 16 * v, none);
      moments.finish(work.byte_sum + 16 * j, work.byte_square + 16 * j);
    }
    for (int64_t c = 0; c < channels; ++c) {
      uint64_t sum = 0, square = 0;
      for (int64_t i = c; i < 16 * period; i += channels) {
        sum += work.byte_sum[i];
        square += work.byte_square[i];
      }
      work.sum[c] += static_cast<double>(sum);
      work.square[c] += static_cast<double>(square);
    }
  }
}

// Pixels in [0, 1] of a token of a floating point clip, zeros up to a whole vector.
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
  }
}

// Their moments about the token's first pixel, so that nothing cancels.
VMAE2_INLINE void add_floats(const Job& job, const Work& work) {
  const int64_t channels = job.shape.channels;
  for (int64_t c = 0; c < channels; ++c) {
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

template <class Pixel>
VMAE2_INLINE void read_token(const Pixel* corner, const Job& job, const Work& work) {
  if constexpr (std::is_same_v<Pixel, uint8_t>) {
    read_bytes(corner, job, work);
  } else {
    read_floats(corner, job, work);
  }
}

template <class Pixel, int P>
VMAE2_INLINE void add_token(const Job& job, const Work& work) {
  if constexpr (std::is_same_v<Pixel, uint8_t>) {
    add_bytes<P>(job, work);
  } else {
    add_floats(job, work);
  }
}

// Vector v of the token that was read.
template <class Pixel>
VMAE2_INLINE Floats pixels16(const Work& work, int64_t v) {
  if constexpr (std::is_same_v<Pixel, uint8_t>) {
    return load16(work.bytes + 16 * v);
  } else {
    return load16(work.block + 16 * v);
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

template <class Pixel>
VMAE2_INLINE const Pixel* token_of_row(const Job& job, int64_t r) {
  return static_cast<const Pixel*>(job.clip) + job.layout.corner(job.shape, r / job.count, job.index[r]);
}

// The lines of bytes of a row to come, fetched into the cache one by one: all at once they would queue up and keep what is
// read now waiting. Nothing for rows past the end and without a token.
template <class Pixel>
class Ahead {
 public:
  VMAE2_INLINE Ahead(const Job& job, int64_t r, int64_t end) {
    if (r >= end || job.index[r] < 0) return;
    at_ = token_of_row<Pixel>(job, r);
    if constexpr (std::is_same_v<Pixel, uint8_t>) {
      patch_ = y_ = job.shape.patch;
      left_ = job.shape.tubelet * patch_;
      line_ = job.layout.line;
      to_next_frame_ = job.layout.frame - patch_ * line_;
      last_ = job.line - 1;
    } else {
      prefetch_token(at_, job.shape, job.layout);
    }
  }
  VMAE2_INLINE void fetch() {
    if (!left_) return;
    --left_;
    prefetch(at_);
    prefetch(at_ + last_);
    at_ += line_;
    if (--y_) return;
    y_ = patch_;
    at_ += to_next_frame_;
  }
  VMAE2_INLINE void fetch_rest() {
    while (left_) fetch();
  }

 private:
  const Pixel* at_ = nullptr;
  int64_t left_ = 0, patch_ = 0, y_ = 0, line_ = 0, to_next_frame_ = 0, last_ = 0;
};

// Centre and factor of the lanes of a period: in registers, or in memory.
template <int P>
struct Constants {
  const float *centres, *factors;

  VMAE2_INLINE Constants(const Job& job, const float* constants, const Work& work)
      : centres(work.centre), factors(work.factor) {
    const int64_t channels = job.shape.channels;
    for (int64_t i = 0; i < 16 * job.period; i += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        work.centre[i + c] = constants[c];
        work.factor[i + c] = constants[channels + c];
      }
    }
  }
  VMAE2_INLINE Floats centre(int64_t j) const { return load16(centres + 16 * j); }
  VMAE2_INLINE Floats factor(int64_t j) const { return load16(factors + 16 * j); }
};

template <>
struct Constants<3> {
  Floats centres[3], factors[3];

  VMAE2_INLINE Constants(const Job&, const float* constants, const Work&) {
    take_turns(constants, centres);
    take_turns(constants + 3, factors);
  }
  VMAE2_INLINE Floats centre(int64_t j) const { return centres[j]; }
  VMAE2_INLINE Floats factor(int64_t j) const { return factors[j]; }
};

template <class Pixel, int P>
VMAE2_INLINE Floats error16(Floats pred, const Work& work, const Constants<P>& constants, int64_t v, int64_t j) {
  return pred - (pixels16<Pixel>(work, v) - constants.centre(j)) * constants.factor(j);
}

// Mean squared error of a token.
template <class Pixel, class Pred, int P>
double token_loss(const Pred* pred, const float* kept, const Job& job, const Work& work, Ahead<Pixel> ahead) {
  const Constants<P> constants(job, kept, work);
  const int64_t whole = job.row / 16, rest = job.row % 16, period = P ? P : job.period;
  Sums<P> squares(work.squares, period);
  int64_t v = 0;
  for (; v + period <= whole; v += period) {
    ahead.fetch();
    for (int64_t j = 0; j < period; ++j) {
      const Floats d = error16<Pixel, P>(load16(pred + 16 * (v + j)), work, constants, v + j, j);
      squares.add(j, d * d);
    }
  }
  for (int64_t j = 0; j < period; ++j) {
    if (v + j < whole) {
      const Floats d = error16<Pixel, P>(load16(pred + 16 * (v + j)), work, constants, v + j, j);
      squares.add(j, d * d);
    }
  }
  squares.finish(work.squares);
  double sum = 0.0;
  if (rest) {
    const Floats d = error16<Pixel, P>(load_first(pred + 16 * whole, rest), work, constants, whole, whole % period);
    float last[16];
    store16(last, d * d);
    for (int64_t i = 0; i < rest; ++i) sum += static_cast<double>(last[i]);
  }
  double lanes[8] = {};
  for (int64_t i = 0; i < 16 * period; i += 8) {
    for (int64_t k = 0; k < 8; ++k) lanes[k] += static_cast<double>(work.squares[i + k]);
  }
  sum += ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  ahead.fetch_rest();
  return sum / static_cast<double>(job.row);
}

template <class Pixel, class Pred, int P>
void token_gradient(const Pred* pred, const float* kept, float scale, Pred* grad, const Job& job, const Work& work,
                    Ahead<Pixel> ahead) {
  const Constants<P> constants(job, kept, work);
  const int64_t whole = job.row / 16, rest = job.row % 16, period = P ? P : job.period;
  const Floats factor = splat(scale);
  int64_t v = 0;
  for (; v + period <= whole; v += period) {
    ahead.fetch();
    for (int64_t j = 0; j < period; ++j) {
      const int64_t i = 16 * (v + j);
      store16(grad + i, error16<Pixel, P>(load16(pred + i), work, constants, v + j, j) * factor);
    }
  }
  for (int64_t j = 0; v < whole; ++v, ++j) {
    store16(grad + 16 * v, error16<Pixel, P>(load16(pred + 16 * v), work, constants, v, j) * factor);
  }
  if (rest) {
    const Floats d = error16<Pixel, P>(load_first(pred + 16 * v, rest), work, constants, v, v % period);
    store_first(grad + 16 * v, d * factor, rest);
  }
  ahead.fetch_rest();
}

// Read row r, if there is one.
template <class Pixel>
VMAE2_INLINE void read_row(const Job& job, int64_t r, int64_t end, const Work& work) {
  if (r < end && job.index[r] >= 0) read_token(token_of_row<Pixel>(job, r), job, work);
}

// Every row is read while the one before it is worked on: when it is wanted, its bytes have left the store buffer, where they
// would wait behind the stores of a gradient.

template <class Pixel, class Pred, int P>
void loss_rows(const Job& job, const Work& work, int64_t begin, int64_t end) {
  const int64_t kept = 2 * job.shape.channels;
  Work here = work, next = work.other();
  read_row<Pixel>(job, begin, end, here);
  for (int64_t r = begin; r < end; ++r, std::swap(here, next)) {
    float* constants = job.statistics + r * kept;
    read_row<Pixel>(job, r + 1, end, next);
    if (job.index[r] < 0) {
      std::fill(constants, constants + kept, 0.0f);
      job.losses[r] = 0.0;
      continue;
    }
    if (job.normalize) add_token<Pixel, P>(job, here);
    channel_constants<Pixel>(job, here, constants);
    job.losses[r] = token_loss<Pixel, Pred, P>(static_cast<const Pred*>(job.pred) + r * job.row, constants, job, here,
                                               Ahead<Pixel>(job, r + 2, end));
  }
}

template <class Pixel, class Pred, int P>
void gradient_rows(const Job& job, const Work& work, int64_t begin, int64_t end) {
  const int64_t kept = 2 * job.shape.channels;
  Work here = work, next = work.other();
  read_row<Pixel>(job, begin, end, here);
  for (int64_t r = begin; r < end; ++r, std::swap(here, next)) {
    Pred* grad = static_cast<Pred*>(job.grad) + r * job.row;
    read_row<Pixel>(job, r + 1, end, next);
    if (job.index[r] < 0) {
      std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(job.row) * sizeof(Pred));
      continue;
    }
    token_gradient<Pixel, Pred, P>(static_cast<const Pred*>(job.pred) + r * job.row, job.statistics + r * kept, job.scale,
                                   grad, job, here, Ahead<Pixel>(job, r + 2, end));
  }
}
