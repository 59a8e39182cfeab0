// Sixteen float lanes in two AVX registers. See each_isa.h.

struct Floats {
  __m256 low, high;
};

VMAE2_INLINE Floats splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

VMAE2_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
VMAE2_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
VMAE2_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
VMAE2_INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
VMAE2_INLINE Floats square_root(Floats a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }

// The channels of the lanes of three vectors, where three channels take turns.
VMAE2_INLINE void take_turns(const float* three, Floats* out) {
  const __m256 all = _mm256_setr_ps(three[0], three[1], three[2], 0, 0, 0, 0, 0);
  const __m256 a = _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 1, 2, 0, 1, 2, 0, 1));
  const __m256 b = _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(2, 0, 1, 2, 0, 1, 2, 0));
  const __m256 c = _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(1, 2, 0, 1, 2, 0, 1, 2));
  out[0] = {a, b};
  out[1] = {c, a};
  out[2] = {b, c};
}

// Sixteen bytes, and as floats.
using Bytes = __m128i;
VMAE2_INLINE Bytes load_bytes(const uint8_t* in) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)); }
VMAE2_INLINE Bytes shuffle(Bytes bytes, Bytes from) { return _mm_shuffle_epi8(bytes, from); }  // 0 where from's top bit is set
VMAE2_INLINE Bytes either(Bytes a, Bytes b) { return _mm_or_si128(a, b); }
VMAE2_INLINE Floats widen(Bytes bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

VMAE2_INLINE Floats load16(const uint8_t* in) { return widen(load_bytes(in)); }

VMAE2_INLINE Floats load16(const float* in) { return {_mm256_loadu_ps(in), _mm256_loadu_ps(in + 8)}; }

VMAE2_INLINE __m256 load8(const bf16* in) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
VMAE2_INLINE Floats load16(const bf16* in) { return {load8(in), load8(in + 8)}; }

VMAE2_INLINE __m256 load8(const f16* in) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))); }
VMAE2_INLINE Floats load16(const f16* in) { return {load8(in), load8(in + 8)}; }

VMAE2_INLINE void store16(float* out, Floats value) {
  _mm256_storeu_ps(out, value.low);
  _mm256_storeu_ps(out + 8, value.high);
}

// The upper half of each float, rounded; NaN becomes 0x7fc0. As store(bf16&, float).
VMAE2_INLINE __m256i rounded(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
}
VMAE2_INLINE void store16(bf16* out, Floats value) {
  const __m256i mixed = _mm256_packus_epi32(rounded(value.low), rounded(value.high));  // 128-bit halves of both, interleaved
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0)));
}

// NaN keeps its sign but not its payload, as in store(f16&, float).
VMAE2_INLINE __m128i half8(__m256 value) {
  const __m256 sign = _mm256_and_ps(value, _mm256_set1_ps(-0.0f));
  const __m256 quiet = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
  const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_cvtps_ph(_mm256_blendv_ps(value, quiet, nan), _MM_FROUND_TO_NEAREST_INT);
}
VMAE2_INLINE void store16(f16* out, Floats value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), half8(value.low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), half8(value.high));
}

// Sums and sums of squares of bytes by lane, two vectors at a time; up to kMostPairs fit.
struct Moments {
  __m256i sums;       // of 16 bits
  __m256i low, high;  // squares of lanes 0-3 and 8-11, 4-7 and 12-15

  VMAE2_INLINE Moments() { sums = low = high = _mm256_setzero_si256(); }
  VMAE2_INLINE void add(const uint8_t* a, const uint8_t* b) {
    const __m256i x = _mm256_cvtepu8_epi16(load_bytes(a)), y = _mm256_cvtepu8_epi16(load_bytes(b));
    sums = _mm256_add_epi16(sums, _mm256_add_epi16(x, y));
    const __m256i first = _mm256_unpacklo_epi16(x, y), second = _mm256_unpackhi_epi16(x, y);  // both vectors' bytes of a lane
    low = _mm256_add_epi32(low, _mm256_madd_epi16(first, first));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(second, second));
  }
  VMAE2_INLINE void finish(uint32_t* sum, uint32_t* square) const {
    auto* sum8 = reinterpret_cast<__m256i*>(sum);
    auto* square8 = reinterpret_cast<__m256i*>(square);
    _mm256_storeu_si256(sum8, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sums)));
    _mm256_storeu_si256(sum8 + 1, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sums, 1)));
    _mm256_storeu_si256(square8, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(square8 + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
};

// Sixteen unsigned 32-bit words.
struct Words {
  __m256i low, high;
};

VMAE2_INLINE Words splat_word(uint32_t value) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(value));
  return {all, all};
}

VMAE2_INLINE Words load_words(const uint32_t* in) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 8))};
}

VMAE2_INLINE void store_words(uint32_t* out, Words value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), value.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), value.high);
}

VMAE2_INLINE Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }

// Upper and lower 32 bits of the products with a number: even and odd lanes apart, then woven together.
VMAE2_INLINE void multiply8(__m256i a, __m256i by, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(a, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), by);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
VMAE2_INLINE void multiply(Words a, uint32_t by, Words& high, Words& low) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(by));
  multiply8(a.low, all, high.low, low.low);
  multiply8(a.high, all, high.high, low.high);
}
