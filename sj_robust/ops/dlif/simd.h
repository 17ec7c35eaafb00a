// Vector vocabulary of one instruction set: re-included by every SJR_BODY, hence no include guard.
namespace sjr {
namespace SJR_SET {
namespace {

template <class C>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(SJR_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(SJR_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(SJR_VECTOR_BYTES)));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(SJR_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(SJR_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(SJR_VECTOR_BYTES)));
};
template <class C>
using Vec = typename Simd<C>::V;

template <class C>
constexpr int LANES = SJR_VECTOR_BYTES / int(sizeof(C));
constexpr int ROWS =
    512 / SJR_VECTOR_BYTES;  // vectors of a block: T short rows are slower to fetch than long ones
template <class C>
constexpr int BLOCK = ROWS * LANES<C>;  // neurons that walk through all steps together

template <class C>
SJR_INLINE Vec<C> load(const C* p) {
  Vec<C> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class C>
SJR_INLINE void store(C* p, Vec<C> v) {
  std::memcpy(p, &v, sizeof v);
}

// Past the cache where STREAM is set; p must then be aligned to the vector.
template <bool STREAM, class C>
SJR_INLINE void put(C* p, Vec<C> v) {
  if constexpr (STREAM) {
#if defined(__clang__)
    __builtin_nontemporal_store(v, reinterpret_cast<Vec<C>*>(p));
    return;
#elif defined(__x86_64__)
#if SJR_LEVEL == 2
    _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
    return;
#elif SJR_LEVEL == 1
    _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
    return;
#elif SJR_VECTOR_BYTES == 16
    _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
    return;
#endif
#endif
  }
  store(p, v);
}

template <class C>
SJR_INLINE Vec<C> fill(C a) {
  return a - Vec<C>{};
}  // keeps the sign of -0.0, unlike a + 0

template <class C>
SJR_INLINE Vec<C> magnitude(Vec<C> v) {
  using U = typename Simd<C>::U;
  return (Vec<C>)((U)v & (~U{} >> 1));
}

// max(v, 0), with NaN staying NaN: of two operands that cannot be ordered the instruction takes the
// second.
template <class C>
SJR_INLINE Vec<C> positive_part(Vec<C> v) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<C, float>) {
#if SJR_LEVEL == 2
    return (Vec<C>)_mm512_max_ps(__m512{}, (__m512)v);
#elif SJR_LEVEL == 1
    return (Vec<C>)_mm256_max_ps(__m256{}, (__m256)v);
#elif SJR_VECTOR_BYTES == 16
    return (Vec<C>)_mm_max_ps(__m128{}, (__m128)v);
#endif
  }
#endif
  return v < C(0) ? Vec<C>{} : v;
}

// Sum of N numbers, halves on halves.
template <class C, int N = LANES<C>>
SJR_INLINE C sum_lanes(const C* p) {
  if constexpr (N == 1) {
    return *p;
  } else {
    typedef C Piece __attribute__((vector_size(N / 2 * sizeof(C))));
    Piece low, high;
    std::memcpy(&low, p, sizeof low);
    std::memcpy(&high, p + N / 2, sizeof high);
    alignas(Piece) C sums[N / 2];
    low += high;
    std::memcpy(sums, &low, sizeof low);
    return sum_lanes<C, N / 2>(sums);
  }
}

template <class C>
SJR_INLINE C sum_vector(Vec<C> v) {
  alignas(SJR_VECTOR_BYTES) C lanes[LANES<C>];
  store(lanes, v);
  return sum_lanes(lanes);
}

// e^x. In float a polynomial, relative error < 2e-7, x at most 88, and 0 where the result is hardly
// a normal number; NaN stays NaN.
SJR_INLINE Vec<float> exponential(Vec<float> x) {
  using U = Simd<float>::U;
  x = x > 88.0f ? fill(88.0f) : x;
  const Vec<float> shifted =
      x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer part sits in the low bits
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const U power = ((U)shifted << 23) + (127u << 23);
  return x < -87.0f ? Vec<float>{} : y * (Vec<float>)power;
}

SJR_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) {
    x[i] = __builtin_exp(x[i]);
  }
  return x;
}

// Numbers as stored and as computed with. Branch-free, so that a loop over a row becomes vector
// code; conversions to half and bfloat16 round to nearest even, as torch's do.
template <class To, class From>
SJR_INLINE To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "same size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class C>
SJR_INLINE C widen(C a) {
  return a;
}

template <class C>
SJR_INLINE C widen(BFloat16 a) {
  return C(bits_as<float>(uint32_t(a.bits) << 16));
}

template <class C>
SJR_INLINE C widen(Half a) {
  const uint32_t sign = uint32_t(a.bits & 0x8000u) << 16;
  const uint32_t m = uint32_t(a.bits & 0x7fffu) << 13;
  const uint32_t subnormal =
      bits_as<uint32_t>(bits_as<float>(m + (113u << 23)) - bits_as<float>(113u << 23));
  const uint32_t finite = m < (1u << 23) ? subnormal : m + (112u << 23);
  return C(bits_as<float>(sign | (m >= (31u << 23) ? m + (224u << 23) : finite)));
}

template <class S, class C>
struct Narrow {
  static SJR_TARGET_INLINE S from(C a) { return a; }
};
template <class C>
struct Narrow<BFloat16, C> {
  static SJR_TARGET_INLINE BFloat16 from(C a) {
    const uint32_t u = bits_as<uint32_t>(a);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};
template <class C>
struct Narrow<Half, C> {
  static SJR_TARGET_INLINE Half from(C a) {
    const uint32_t u = bits_as<uint32_t>(a);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t m = u & 0x7fffffffu;
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(m) + 0.5f) - (126u << 23);
    const uint32_t normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    const uint32_t special = m > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {uint16_t(sign | (m >= 0x47800000u ? special : m < 0x38800000u ? subnormal : normal))};
  }
};

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
