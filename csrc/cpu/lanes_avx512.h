// Sixteen float lanes in one AVX-512 register. See each_isa.h.

struct Floats {
  __m512 all;
};

VMAE2_INLINE Floats splat(float value) { return {_mm512_set1_ps(value)}; }

VMAE2_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.all, b.all)}; }
VMAE2_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.all, b.all)}; }
VMAE2_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.all, b.all)}; }
VMAE2_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.all, b.all)}; }
VMAE2_INLINE Floats square_root(Floats a) { return {_mm512_sqrt_ps(a.all)}; }

// The channels of the lanes of three vectors, where three channels take turns.
VMAE2_INLINE void take_turns(const float* three, Floats* out) {
  const __m512 all = _mm512_castps128_ps512(_mm_setr_ps(three[0], three[1], three[2], 0));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0);
  const __m512i next = _mm512_setr_epi32(1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1);
  const __m512i last = _mm512_setr_epi32(2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2);
  out[0] = {_mm512_permutexvar_ps(lanes, all)};
  out[1] = {_mm512_permutexvar_ps(next, all)};
  out[2] = {_mm512_permutexvar_ps(last, all)};
}

// Sixteen bytes, and as floats.
using Bytes = __m128i;
VMAE2_INLINE Bytes load_bytes(const uint8_t* in) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)); }
VMAE2_INLINE Bytes shuffle(Bytes bytes, Bytes from) { return _mm_shuffle_epi8(bytes, from); }  // 0 where from's top bit is set
VMAE2_INLINE Bytes either(Bytes a, Bytes b) { return _mm_or_si128(a, b); }
VMAE2_INLINE Floats widen(Bytes bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))}; }

VMAE2_INLINE Floats load16(const uint8_t* in) { return widen(load_bytes(in)); }

VMAE2_INLINE Floats load16(const float* in) { return {_mm512_loadu_ps(in)}; }

VMAE2_INLINE Floats load16(const bf16* in) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

VMAE2_INLINE Floats load16(const f16* in) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)))};
}

VMAE2_INLINE void store16(float* out, Floats value) { _mm512_storeu_ps(out, value.all); }

// The upper half of each float, rounded; NaN becomes 0x7fc0. As store(bf16&, float); AVX512_BF16 would flush subnormals.
VMAE2_INLINE void store16(bf16* out, Floats value) {
  const __m512i bits = _mm512_castps_si512(value.all);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value.all, value.all, _CMP_UNORD_Q);
  const __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(half));
}

// NaN keeps its sign but not its payload, as in store(f16&, float).
VMAE2_INLINE void store16(f16* out, Floats value) {
  const __m512i bits = _mm512_castps_si512(value.all);
  const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value.all, value.all, _CMP_UNORD_Q);
  const __m512i clean = _mm512_mask_or_epi32(bits, nan, sign, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(_mm512_castsi512_ps(clean), _MM_FROUND_TO_NEAREST_INT));
}

// Sums and sums of squares of bytes by lane, two vectors at a time; up to kMostPairs fit.
struct Moments {
  __m512i sums, squares;

  VMAE2_INLINE Moments() { sums = squares = _mm512_setzero_si512(); }
  VMAE2_INLINE void add(const uint8_t* a, const uint8_t* b) {
    const __m512i x = _mm512_cvtepu8_epi32(load_bytes(a)), y = _mm512_cvtepu8_epi32(load_bytes(b));
    sums = _mm512_add_epi32(sums, _mm512_add_epi32(x, y));
    const __m512i both = _mm512_or_si512(x, _mm512_slli_epi32(y, 16));
    squares = _mm512_add_epi32(squares, _mm512_madd_epi16(both, both));
  }
  VMAE2_INLINE void finish(uint32_t* sum, uint32_t* square) const {
    _mm512_storeu_si512(sum, sums);
    _mm512_storeu_si512(square, squares);
  }
};

// Sixteen unsigned 32-bit words.
struct Words {
  __m512i all;
};

VMAE2_INLINE Words splat_word(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }

VMAE2_INLINE Words load_words(const uint32_t* in) { return {_mm512_loadu_si512(in)}; }

VMAE2_INLINE void store_words(uint32_t* out, Words value) { _mm512_storeu_si512(out, value.all); }

VMAE2_INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.all, b.all)}; }

// Upper and lower 32 bits of the products with a number: even and odd lanes apart, then woven together.
VMAE2_INLINE void multiply(Words a, uint32_t by, Words& high, Words& low) {
  const __m512i all = _mm512_set1_epi32(static_cast<int>(by));
  const __m512i even = _mm512_mul_epu32(a.all, all), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.all, 32), all);
  high.all = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low.all = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
