// Sixteen float lanes in plain C++. See each_isa.h.

struct Floats {
  float at[16];
};

VMAE2_INLINE Floats splat(float value) {
  Floats out;
  for (float& lane : out.at) lane = value;
  return out;
}

template <class T>
VMAE2_INLINE Floats load16(const T* in) {
  Floats out;
  for (int i = 0; i < 16; ++i) out.at[i] = load(in[i]);
  return out;
}

template <class T>
VMAE2_INLINE void store16(T* out, Floats value) {
  for (int i = 0; i < 16; ++i) store(out[i], value.at[i]);
}

VMAE2_INLINE Floats operator+(Floats a, Floats b) {
  for (int i = 0; i < 16; ++i) a.at[i] += b.at[i];
  return a;
}

VMAE2_INLINE Floats operator-(Floats a, Floats b) {
  for (int i = 0; i < 16; ++i) a.at[i] -= b.at[i];
  return a;
}

VMAE2_INLINE Floats operator*(Floats a, Floats b) {
  for (int i = 0; i < 16; ++i) a.at[i] *= b.at[i];
  return a;
}
