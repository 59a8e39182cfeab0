// What all instruction sets share on top of lanes_<set>.h: parts of a vector, short copies. See each_isa.h.

// The first n < 16 lanes of in, zeros behind; nothing past in[n - 1] is read.
template <class T>
VMAE2_INLINE Floats load_first(const T* in, int64_t n) {
  T padded[16] = {};
  std::memcpy(padded, in, static_cast<size_t>(n) * sizeof(T));
  return load16(padded);
}

template <class T>
VMAE2_INLINE void store_first(T* out, Floats value, int64_t n) {
  T padded[16];
  store16(padded, value);
  std::memcpy(out, padded, static_cast<size_t>(n) * sizeof(T));
}

// memcpy for the few dozen bytes of a line: the last piece overlaps the one before it instead of being cut short.
VMAE2_INLINE void copy_short(void* out, const void* in, int64_t bytes) {
  auto* to = static_cast<unsigned char*>(out);
  const auto* from = static_cast<const unsigned char*>(in);
  if (bytes < 16) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i + 16 < bytes; i += 16) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + bytes - 16, from + bytes - 16, 16);
}
