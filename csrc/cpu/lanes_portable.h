// Sixteen float lanes in plain C++. See each_isa.h.

struct Floats {
  float at[16];
};

VMAE2_INLINE Floats splat(float value) {
  Floats out;
  for (float& lane : out.at) lane = value;
  return out;
}

// The channels of the lanes of three vectors, where three channels take turns.
VMAE2_INLINE void take_turns(const float* three, Floats* out) {
  for (int i = 0; i < 48; ++i) out[i / 16].at[i % 16] = three[i % 3];
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

VMAE2_INLINE Floats operator/(Floats a, Floats b) {
  for (int i = 0; i < 16; ++i) a.at[i] /= b.at[i];
  return a;
}

VMAE2_INLINE Floats square_root(Floats a) {
  for (float& lane : a.at) lane = std::sqrt(lane);
  return a;
}

// Sums and sums of squares of bytes by lane, two vectors at a time; up to kMostPairs fit.
struct Moments {
  uint32_t sums[16] = {}, squares[16] = {};

  VMAE2_INLINE void add(const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 16; ++i) {
      sums[i] += uint32_t{a[i]} + b[i];
      squares[i] += uint32_t{a[i]} * a[i] + uint32_t{b[i]} * b[i];
    }
  }
  VMAE2_INLINE void finish(uint32_t* sum, uint32_t* square) const {
    std::memcpy(sum, sums, sizeof(sums));
    std::memcpy(square, squares, sizeof(squares));
  }
};

// Sixteen unsigned 32-bit words.
struct Words {
  uint32_t at[16];
};

VMAE2_INLINE Words splat_word(uint32_t value) {
  Words out;
  for (uint32_t& lane : out.at) lane = value;
  return out;
}

VMAE2_INLINE Words load_words(const uint32_t* in) {
  Words out;
  std::memcpy(out.at, in, sizeof(out.at));
  return out;
}

VMAE2_INLINE void store_words(uint32_t* out, Words value) { std::memcpy(out, value.at, sizeof(value.at)); }

VMAE2_INLINE Words operator^(Words a, Words b) {
  for (int i = 0; i < 16; ++i) a.at[i] ^= b.at[i];
  return a;
}

// Upper and lower 32 bits of the products with a number.
VMAE2_INLINE void multiply(Words a, uint32_t by, Words& high, Words& low) {
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = uint64_t{by} * a.at[i];
    high.at[i] = static_cast<uint32_t>(product >> 32);
    low.at[i] = static_cast<uint32_t>(product);
  }
}
