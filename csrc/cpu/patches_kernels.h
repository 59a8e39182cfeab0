// Kernels of patches.cpp, one instruction set. See each_isa.h.

// out[i*OUT] = in[i*IN] * scale + shift, for one line of one channel. Strides are compile-time where they are common,
// so that the compiler can vectorise; 0 stands for a stride known at run time only.
template <int IN, int OUT, class In, class Out>
VMAE2_INLINE void line(const In* in, int64_t in_stride, Out* out, int64_t out_stride, int64_t n, float scale, float shift) {
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

// One token between any two layouts, both given by the address of the token's first pixel.
template <int IN, int OUT, class In, class Out>
void strided_token(const In* in, const Layout& from, Out* out, const Layout& to, const Clip& s, const float* scale,
                   const float* shift) {
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
void strided_token(const In* in, const Layout& from, Out* out, const Layout& to, const Clip& s, const float* scale,
                   const float* shift) {
  if (from.pixel == 1 && to.pixel == 1) return strided_token<1, 1>(in, from, out, to, s, scale, shift);
  if (from.pixel == 3 && to.pixel == 1) return strided_token<3, 1>(in, from, out, to, s, scale, shift);
  if (from.pixel == 1 && to.pixel == 3) return strided_token<1, 3>(in, from, out, to, s, scale, shift);
  strided_token<0, 0>(in, from, out, to, s, scale, shift);
}

#ifdef VMAE2_BYTES
// What picks one channel out of sixteen pixels and normalises it, in registers.
template <int C>
struct Channel {
  Bytes pick[C];
  int64_t offset[C];
  Floats scale, shift;

  VMAE2_INLINE Channel(const Gather& job, int c) {
    for (int i = 0; i < C; ++i) {
      pick[i] = load_bytes(job.pick[c][i]);
      offset[i] = job.offset[i];
    }
    scale = splat(job.scale[c]);
    shift = splat(job.shift[c]);
  }
  VMAE2_INLINE Floats of(const uint8_t* pixels) const {
    Bytes channel = shuffle(load_bytes(pixels + offset[0]), pick[0]);
    for (int i = 1; i < C; ++i) channel = either(channel, shuffle(load_bytes(pixels + offset[i]), pick[i]));
    return widen(channel) * scale + shift;
  }
};

// Bytes with interleaved channels to rows in order (c, t, y, x): sixteen pixels at a time, `C` loads of sixteen bytes and the
// shuffles that pick a channel's bytes from them (prepared in `Gather`). Channel by channel, though the bytes are then read C
// times: they are in the nearest cache, and a row written from front to back takes two thirds of the time of C streams into
// it. The lines of `next`, the token that follows, are fetched one by one in between; all at once they would queue up.
template <int C, class Out>
void planar_token(const uint8_t* in, const uint8_t* next, Out* out, const Gather& job) {
  const int64_t patch = job.shape.patch, tubelet = job.shape.tubelet, plane = patch * patch, last = patch * C - 1;
  const int64_t frame = job.from.frame, stride = job.from.line;
  const int64_t width = std::min<int64_t>(patch, 16);  // pixels of a step
  // A narrow patch writes past its line, into the next ones, which are written later; not past the plane's end.
  const int64_t whole = plane < 16 ? 0 : std::min(patch, (plane - 16) / patch + 1);
  for (int c = 0; c < C; ++c) {
    const Channel<C> channel(job, c);
    for (int64_t t = 0; t < tubelet; ++t, out += plane) {
      const uint8_t* line = in + t * frame;
      // Both ends of a line, in two passes; what a third asks for is there already.
      const uint8_t* ahead = next + t * frame + (c == 0 ? 0 : last);
      for (int64_t y = 0; y < patch; ++y, line += stride, ahead += stride) {
        prefetch(ahead);
        if (C == 1) prefetch(ahead + last);
        for (int64_t step = 0; step < patch; step += 16) {
          const int64_t x = std::min(step, patch - width);  // the last step overlaps
          const Floats row = channel.of(line + x * C);
          if (y < whole) {
            store16(out + y * patch + x, row);
          } else {
            store_first(out + y * patch + x, row, width);
          }
        }
      }
    }
  }
}
#endif

// Bytes to rows in the clip's own order: every line is one run of bytes.
template <class Out>
void interleaved_token(const uint8_t* in, Out* out, const Gather& job) {
  const Clip& s = job.shape;
  const int64_t n = s.patch * s.channels;
  for (int64_t t = 0; t < s.tubelet; ++t) {
    for (int64_t y = 0; y < s.patch; ++y, out += n) {
      const uint8_t* from = in + t * job.from.frame + y * job.from.line;
      for (int64_t step = 0; step < n; step += 16) {
        const int64_t i = std::min(step, n - 16);
        store16(out + i, load16(from + i) * load16(job.line_scale + i) + load16(job.line_shift + i));
      }
    }
  }
}

// Between planes of the same direction: every line is a run.
template <class In, class Out>
void planes_token(const In* in, const Layout& from, Out* out, const Layout& to, const Clip& s) {
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t t = 0; t < s.tubelet; ++t) {
      for (int64_t y = 0; y < s.patch; ++y) {
        const In* source = in + c * from.channel + t * from.frame + y * from.line;
        Out* target = out + c * to.channel + t * to.frame + y * to.line;
        if constexpr (std::is_same_v<In, Out>) {
          copy_short(target, source, s.patch * static_cast<int64_t>(sizeof(In)));
        } else if (s.patch < 16) {
          store_first(target, load_first(source, s.patch), s.patch);
        } else {
          for (int64_t step = 0; step < s.patch; step += 16) {
            const int64_t x = std::min(step, s.patch - 16);
            store16(target + x, load16(source + x));
          }
        }
      }
    }
  }
}

// One token; `next` is the one whose bytes will be wanted after it.
template <class In, class Out>
void gather_token(const In* in, const In* next, Out* out, const Gather& job) {
  const Clip& s = job.shape;
#ifdef VMAE2_BYTES
  if constexpr (std::is_same_v<In, uint8_t>) {
    if (s.patch * s.channels >= 16 && !job.pixel_order) {
      if (s.channels == 3) return planar_token<3>(in, next, out, job);
      if (s.channels == 1) return planar_token<1>(in, next, out, job);
      if (s.channels == 4) return planar_token<4>(in, next, out, job);
    }
  }
#endif
  prefetch_token(next, s, job.from);
  if constexpr (std::is_same_v<In, uint8_t>) {
    if (s.patch * s.channels >= 16 && job.pixel_order) return interleaved_token(in, out, job);
  } else if (!job.pixel_order) {
    return planes_token(in, job.from, out, job.to, s);
  }
  strided_token(in, job.from, out, job.to, s, job.scale, job.shift);
}

template <class In>
VMAE2_INLINE const In* token_of_row(const Gather& job, int64_t r) {
  return static_cast<const In*>(job.clip) + job.from.corner(job.shape, r / job.count, job.index[r]);
}

template <class In, class Out>
void gather_rows(const Gather& job, int64_t begin, int64_t end) {
  const int64_t row = job.to.batch;
  for (int64_t r = begin; r < end; ++r) {
    Out* out = static_cast<Out*>(job.rows) + r * row;
    if (job.index[r] < 0) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(row) * sizeof(Out));
    } else {
      const int64_t after = r + 1 < end && job.index[r + 1] >= 0 ? r + 1 : r;
      gather_token(token_of_row<In>(job, r), token_of_row<In>(job, after), out, job);
    }
  }
}

// Rows of the grid [begin, end), of all clips: each writes its lines of every channel once, rows where there are, else zeros.
template <class T>
void scatter_grid_rows(const Scatter& job, int64_t begin, int64_t end) {
  const Clip& s = job.shape;
  const int64_t height = s.height / s.patch, width = s.width / s.patch, cell = s.patch * static_cast<int64_t>(sizeof(T));
  for (int64_t g = begin; g < end; ++g) {
    const int32_t* owner = job.owner + g * width;  // row of each token, -1 where there is none
    T* corner = static_cast<T*>(job.clip) + job.to.corner(s, g / (s.frames / s.tubelet * height),
                                                          g % (s.frames / s.tubelet * height) * width);
    for (int64_t x = 0; x < width;) {
      if (owner[x] >= 0) {
        const T* row = static_cast<const T*>(job.rows) + owner[x] * job.from.batch;
        if (job.pixel_order) {
          strided_token(row, job.from, corner + x * s.patch, job.to, s, nullptr, nullptr);
        } else {
          planes_token(row, job.from, corner + x * s.patch, job.to, s);
        }
        ++x;
        continue;
      }
      int64_t after = x + 1;
      while (after < width && owner[after] < 0) ++after;
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t t = 0; t < s.tubelet; ++t) {
          for (int64_t y = 0; y < s.patch; ++y) {
            std::memset(static_cast<void*>(corner + c * job.to.channel + t * job.to.frame + y * job.to.line + x * s.patch), 0,
                        static_cast<size_t>((after - x) * cell));
          }
        }
      }
      x = after;
    }
  }
}
