// One side's transformed logits along a row, and the loops over it. Included by row_kernels.h.

namespace tropd {
namespace TROPD_ISA {
namespace {

constexpr int64_t BLOCK = 1024;

// One side's transformed logits along a row.
template <class T, class L, bool PLAIN>
struct Source {
  const L* row;
  const T* bias;
  T scale, cap, temperature;

  Source(const Logits& how, int64_t i)
      : row(static_cast<const L*>(how.data) + i * how.stride),
        bias(static_cast<const T*>(how.bias)),
        scale(T(how.scale)), cap(T(how.cap)), temperature(T(how.temperature)) {}

  TROPD_INLINE Vector<T> transform(Vector<T> z) const {
    z = z * scale;
    if (cap != 0) z = tanh<T>(z / cap) * cap;
    return z / temperature;
  }
  TROPD_INLINE Vector<T> at(int64_t v) const {
    Vector<T> z = load<T>(row + v);
    if (PLAIN) return z;
    if (bias != nullptr) z = z + load<T>(bias + v);
    return transform(z);
  }
  // The last, incomplete vector; -inf where the row has ended.
  Vector<T> tail(int64_t v, int64_t count) const {
    if (count > Types<T>::lanes) __builtin_unreachable();  // or GCC warns of it
    L padded[Types<T>::lanes] = {};
    T padded_bias[Types<T>::lanes] = {};
    std::memcpy(padded, row + v, count * sizeof(L));
    if (bias != nullptr) std::memcpy(padded_bias, bias + v, count * sizeof(T));
    Vector<T> z = load<T>(padded);
    if (!PLAIN) z = transform(z + load<T>(padded_bias));
    for (int i = int(count); i < Types<T>::lanes; ++i) z[i] = -std::numeric_limits<T>::infinity();
    return z;
  }
  // Fetches what stands a block behind v: processors' own prefetching ends with a page.
  TROPD_INLINE void next_block(int64_t v) const { __builtin_prefetch(row + v + BLOCK); }
  Vector<T> one(int64_t v) const { return tail(v, 1); }  // in lane 0
};

template <class T, class F>
TROPD_INLINE void for_blocks(int64_t vocab, const F& f) {
  for (int64_t low = 0; low < vocab; low += BLOCK) f(low, low + BLOCK < vocab ? low + BLOCK : vocab);
}

// Calls f(first, count) for the vectors of [low, high): count is `lanes` but for the last.
template <class T, class F>
TROPD_INLINE void for_vectors(int64_t low, int64_t high, const F& f) {
  constexpr int lanes = Types<T>::lanes;
  int64_t v = low;
  for (; v + lanes <= high; v += lanes) f(v, lanes);
  if (v < high) f(v, int(high - v));
}

template <class T, class S>
TROPD_INLINE Vector<T> get(const S& source, int64_t v, int count) {
  return count == Types<T>::lanes ? source.at(v) : source.tail(v, count);
}

// sum += the float32 sum of one block
template <class T>
TROPD_INLINE void flush(typename Types<T>::wide& sum, Vector<T> block) {
  sum += __builtin_convertvector(block, typename Types<T>::wide);
}

template <class T>
TROPD_INLINE Vector<T> product(Vector<T> weight, Vector<T> value) {  // 0 * anything = 0
  return weight > T(0) ? weight * value : all<T>(0);
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
