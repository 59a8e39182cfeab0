// Kernel of roi_align.cpp, one instruction set. See each_isa.h.

template <class T>
VMAE2_INLINE Floats load_lanes(const T* in, int64_t n) {
  return n >= 16 ? load16(in) : load_first(in, n);
}

// Items [begin, end): item = box * blocks + block of kRoiLanes channels.
template <class T>
void roi_max(const RoiMax& job, int64_t begin, int64_t end) {
  const RoiAlign& in = job.in;
  const int64_t size = in.size, channels = in.channels;
  const T* features = static_cast<const T*>(in.features);
  std::vector<float> line(static_cast<size_t>(in.width * kRoiLanes));
  float value[kRoiLanes], best[kRoiLanes];
  int32_t where[kRoiLanes];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t box = item / job.blocks, first = item % job.blocks * kRoiLanes;
    const int64_t lanes = std::min<int64_t>(kRoiLanes, channels - first);
    const T* image = features + job.image[box] * in.height * in.width * channels + first;
    const RoiTaps y = job.y.of(box), x = job.x.of(box);
    for (int64_t p = 0; p < size; ++p) {
      for (int64_t column = x.begin; column < x.end; ++column) {
        float* out = line.data() + (column - x.begin) * kRoiLanes;
        for (int64_t c = 0; c < lanes; c += 16) {
          Floats sum = splat(0.0f);
          for (int64_t row = y.first[p]; row < y.last[p]; ++row) {
            sum = sum + splat(y.weight[p * in.height + row]) *
                            load_lanes(image + (row * in.width + column) * channels + c, lanes - c);
          }
          store16(out + c, sum);
        }
      }
      for (int64_t q = 0; q < size; ++q) {
        for (int64_t c = 0; c < lanes; c += 16) {
          Floats sum = splat(0.0f);
          for (int64_t column = x.first[q]; column < x.last[q]; ++column) {
            sum = sum + splat(x.weight[q * in.width + column]) * load16(line.data() + (column - x.begin) * kRoiLanes + c);
          }
          store16(value + c, sum);
        }
        const int32_t bin = static_cast<int32_t>(p * size + q);
        if (bin == 0) {
          for (int64_t c = 0; c < lanes; ++c) best[c] = value[c];
          for (int64_t c = 0; c < lanes; ++c) where[c] = 0;
          continue;
        }
        for (int64_t c = 0; c < lanes; ++c) {
          // The first NaN wins over all numbers, as in torch.
          const bool take = (value[c] > best[c]) | ((value[c] != value[c]) & (best[c] == best[c]));
          where[c] = take ? bin : where[c];
          best[c] = take ? value[c] : best[c];
        }
      }
    }
    T* pooled = static_cast<T*>(job.pooled) + box * channels + first;
    uint8_t* bins = job.where + box * channels + first;
    for (int64_t c = 0; c < lanes; ++c) {
      store(pooled[c], best[c]);
      bins[c] = static_cast<uint8_t>(where[c]);
    }
  }
}
