// Vectors of the width that the including file chose, and exp, log1p and tanh on them.
//
// GCC's and Clang's vector extensions instead of intrinsics: one source for AVX-512, AVX2, NEON and
// plain C++, chosen by TROPD_BYTES (the register's width) and TROPD_ISA (a namespace, so that the
// variants do not meet at link time). Included by rows_*.cpp alone, after every other header: what
// stands here is compiled for an instruction set that the machine may lack.
//
// Accuracy, tested against float64: exp within 2 ulp, subnormal results included; log1p on [0, 1]
// and tanh within 4 ulp. Infinities and NaNs mean what they mean in C.

namespace tropd {
namespace TROPD_ISA {

#define TROPD_INLINE inline __attribute__((always_inline))

template <class T>
struct Types;

template <>
struct Types<float> {
  static constexpr int lanes = TROPD_BYTES / 4;
  typedef float vector __attribute__((vector_size(TROPD_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(TROPD_BYTES)));
  typedef double wide __attribute__((vector_size(2 * TROPD_BYTES)));
  using word = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr word bias = 127;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // ln 2 in two parts; multiples of the first by an exponent are exact
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  static constexpr float smallest = -104.0f, largest = 89.0f;  // exp is 0 below and inf above
};

template <>
struct Types<double> {
  static constexpr int lanes = TROPD_BYTES / 8;
  typedef double vector __attribute__((vector_size(TROPD_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(TROPD_BYTES)));
  typedef vector wide;
  using word = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr word bias = 1023;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double smallest = -746.0, largest = 710.0;
};

template <class T>
using Vector = typename Types<T>::vector;
template <class T>
using Bits = typename Types<T>::bits;

template <class T>
TROPD_INLINE Vector<T> all(T value) {
  return Vector<T>{} + value;
}

// An all-ones or all-zeros mask per lane, as comparisons give it.
template <class T, class Mask>
TROPD_INLINE bool any(Mask mask) {
  Bits<T> m = reinterpret_cast<Bits<T>>(mask);
  // By the width, since a target that a pragma sets defines none of the compiler's macros.
#if TROPD_BYTES == 64
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(m), reinterpret_cast<__m512i>(m)) != 0;
#elif TROPD_BYTES == 32
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(m), reinterpret_cast<__m256i>(m));
#else
  typename Types<T>::word found = 0;
  for (int i = 0; i < Types<T>::lanes; ++i) found |= m[i];
  return found != 0;
#endif
}

template <class T>
TROPD_INLINE double total(typename Types<T>::wide v) {
  double sum = 0;
  for (int i = 0; i < Types<T>::lanes; ++i) sum += v[i];
  return sum;
}

// 2^n for integers n in the exponent's range.
template <class T>
TROPD_INLINE Vector<T> power_of_two(Bits<T> n) {
  return reinterpret_cast<Vector<T>>((n + Types<T>::bias) << Types<T>::mantissa);
}

// c[0] + c[1] x + ...
template <class T, int TERMS>
TROPD_INLINE Vector<T> polynomial(const T (&c)[TERMS], Vector<T> x) {
  Vector<T> sum = all<T>(c[TERMS - 1]);
#pragma GCC unroll 20
  for (int k = TERMS - 2; k >= 0; --k) sum = sum * x + c[k];
  return sum;
}

// Coefficients of (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2, and of atanh(s) / s in s^2 for s in
// [0, 1/3]: for doubles those of the series, up to where it is exact, for floats fewer, fitted so that
// the largest error is least: below 0.1 ulp of exp(r), and of atanh(s).
template <class T>
struct Fits {
  T exp[13], atanh[19];
  constexpr Fits() : exp(), atanh() {
    T factor = 1;
    for (int k = 0; k < 13; ++k) exp[k] = factor /= k + 2;
    for (int k = 0; k < 19; ++k) atanh[k] = T(1) / (2 * k + 1);
  }
};
template <>
struct Fits<float> {
  float exp[5] = {0.4999999403953552f, 0.1666651964187622f, 0.04166839271783829f,
                  0.008368780836462975f, 0.0013814467238262296f};
  float atanh[5] = {1.0f, 0.3333320915699005f, 0.2001076340675354f, 0.14000903069972992f,
                    0.1400599330663681f};
};
template <class T>
constexpr Fits<T> fits;

// x = n ln 2 + r with |r| <= ln 2 / 2; gives exp(r) - 1 and n in two halves, so that neither 2^half
// leaves the range where the result is subnormal.
template <class T>
struct Reduced {
  Vector<T> minus_one;
  Bits<T> half, rest;
};

template <class T>
TROPD_INLINE Reduced<T> reduce(Vector<T> x) {
  using C = Types<T>;
  const T log2_e = T(1.44269504088896340736);
  Vector<T> shifted = x * log2_e + C::round;
  Vector<T> n = shifted - C::round;
  Vector<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  // the integer stands in the low bits of `shifted`
  Bits<T> integer = reinterpret_cast<Bits<T>>(shifted) - reinterpret_cast<Bits<T>>(all<T>(C::round));
  constexpr int sign = 8 * sizeof(T) - 1;
  Bits<T> half = (integer >> 1) | ((integer >> sign) << sign);  // arithmetic shift
  return {r + r * r * polynomial(fits<T>.exp, r), half, integer - half};
}

template <class T>
TROPD_INLINE Vector<T> clamp(Vector<T> x, T low, T high) {  // a NaN stays
  x = x < low ? all<T>(low) : x;
  return x > high ? all<T>(high) : x;
}

#if TROPD_BYTES == 64
// The same in half the instructions: one scales by 2^n whatever the result's range, and max and min
// pass on a NaN that is their second operand.
TROPD_INLINE Vector<float> exp_float(Vector<float> x) {
  using C = Types<float>;
  x = _mm512_min_ps(all<float>(C::largest), _mm512_max_ps(all<float>(C::smallest), x));
  const Vector<float> shifted = x * 1.44269504088896340736f + C::round, n = shifted - C::round;
  const Vector<float> r = (x - n * C::ln2_high) - n * C::ln2_low;
  return _mm512_scalef_ps(r + r * r * polynomial(fits<float>.exp, r) + 1.0f, n);
}
#endif

template <class T>
TROPD_INLINE Vector<T> exp(Vector<T> x) {
#if TROPD_BYTES == 64
  if constexpr (sizeof(T) == 4) return exp_float(x);
#endif
  Reduced<T> e = reduce<T>(clamp<T>(x, Types<T>::smallest, Types<T>::largest));
  return (e.minus_one + T(1)) * power_of_two<T>(e.half) * power_of_two<T>(e.rest);
}

// log(1 + x) = 2 atanh(s), s = x / (2 + x), for x in [0, 1].
template <class T>
TROPD_INLINE Vector<T> two_atanh(Vector<T> s) {
  return s * T(2) * polynomial(fits<T>.atanh, s * s);
}
template <class T>
TROPD_INLINE Vector<T> log1p(Vector<T> x) {
  return two_atanh<T>(x / (x + T(2)));
}

// tanh |x| = t / (t + 2), t = exp(2 |x|) - 1, which has no cancellation.
template <class T>
TROPD_INLINE Vector<T> tanh(Vector<T> x) {
  Vector<T> magnitude = x < T(0) ? -x : x;
  Reduced<T> e = reduce<T>(clamp<T>(magnitude * T(2), T(0), T(44)));
  Vector<T> scale = power_of_two<T>(e.half) * power_of_two<T>(e.rest);
  Vector<T> t = scale * e.minus_one + (scale - T(1));
  Vector<T> result = t / (t + T(2));
  return x < T(0) ? -result : result;
}

// log(a + b) from a, b and their logarithms: log(high) + log(1 + low / high) without a cancellation,
// another exponential or a second quotient. Where both have underflowed it is the larger logarithm.
template <class T>
TROPD_INLINE Vector<T> log_sum(Vector<T> a, Vector<T> b, Vector<T> log_a, Vector<T> log_b) {
  const auto first = log_a > log_b;
  const Vector<T> high = first ? a : b, low = first ? b : a;
  const Vector<T> sum = low + high * T(2);
  return (first ? log_a : log_b) + two_atanh<T>(sum > T(0) ? low / sum : all<T>(0));
}

// --- memory: memcpy, because gradients overwrite logits of another type ----------------------------

struct bf16 {
  uint16_t bits;
};

template <class T>
TROPD_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
TROPD_INLINE void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
TROPD_INLINE Vector<T> load(const bf16* from) {
  static_assert(sizeof(T) == 4);
  typedef uint16_t halves __attribute__((vector_size(TROPD_BYTES / 2)));
  halves h;
  __builtin_memcpy(&h, from, sizeof h);
  return reinterpret_cast<Vector<T>>(__builtin_convertvector(h, Bits<T>) << 16);
}

template <class T>
TROPD_INLINE void store(bf16* to, Vector<T> v) {  // rounds to nearest even
  static_assert(sizeof(T) == 4);
  typedef uint16_t halves __attribute__((vector_size(TROPD_BYTES / 2)));
  Bits<T> u = reinterpret_cast<Bits<T>>(v);
  Bits<T> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : Bits<T>{} + 0x7fc0u;
  halves h = __builtin_convertvector(rounded, halves);
  __builtin_memcpy(to, &h, sizeof h);
}

}  // namespace TROPD_ISA
}  // namespace tropd
