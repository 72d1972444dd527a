// Sums over the rows of d_logits, and over the columns of a head, by which a sampled gradient chooses
// its ids (tropd_kernels/loss/sampling.py). Included by row_kernels.h.

namespace tropd {
namespace TROPD_ISA {
namespace {

// sums[0] = sum_i d^2, sums[1] = sum_i hidden[0, i] d^2, sums[2] = sum_i hidden[1, i] d of columns
// [low, high) of (n, V). The sums of a block of columns stay in L1 while its rows pass, a few at a
// time, so that each is loaded and stored once for all of them.
template <class T, class S>
void column_sums_of(const Columns& m, int64_t low, int64_t high) {
  constexpr int lanes = Types<T>::lanes, vectors = COLUMNS / lanes, TOGETHER = 4;
  static_assert(COLUMNS % lanes == 0);
  Vector<T> sums[3][vectors];
  const S* rows = static_cast<const S*>(m.data);
  const T *hidden = static_cast<const T*>(m.hidden), *more = hidden + m.n;
  T* out = static_cast<T*>(m.out);
  for (int64_t first = low; first < high; first += COLUMNS) {
    const int64_t count = std::min<int64_t>(COLUMNS, high - first);
    std::memset(sums, 0, sizeof sums);
    auto add = [&](int64_t i, auto height) __attribute__((always_inline)) {
      constexpr int N = decltype(height)::value;
      const S* row = rows + i * m.stride + first;
      for_vectors<T>(0, count, [&](int64_t v, int wide) __attribute__((always_inline)) {
        Vector<T> square = sums[0][v / lanes], spread = sums[1][v / lanes], along = sums[2][v / lanes];
        for (int k = 0; k < N; ++k) {
          Vector<T> d;
          if (wide == lanes) {
            d = load<T>(row + k * m.stride + v);
          } else {
            S last[lanes] = {};
            std::memcpy(last, row + k * m.stride + v, wide * sizeof(S));
            d = load<T>(last);
          }
          square += d * d;
          spread += d * d * hidden[i + k];
          along += d * more[i + k];
        }
        sums[0][v / lanes] = square;
        sums[1][v / lanes] = spread;
        sums[2][v / lanes] = along;
      });
    };
    int64_t i = 0;
    for (; i + TOGETHER <= m.n; i += TOGETHER) add(i, std::integral_constant<int, TOGETHER>{});
    for (; i < m.n; ++i) add(i, std::integral_constant<int, 1>{});
    for (int k = 0; k < 3; ++k) std::memcpy(out + k * m.columns + first, sums[k], count * sizeof(T));
  }
}

// out[i] = sum_j m[i, j]^2 of rows [begin, end).
template <class T, class S>
void row_squares_of(const Columns& m, int64_t begin, int64_t end) {
  constexpr int lanes = Types<T>::lanes, apart = 4;
  for (int64_t i = begin; i < end; ++i) {
    const S* row = static_cast<const S*>(m.data) + i * m.stride;
    Vector<T> sums[apart] = {};
    int64_t v = 0;
    for (; v + apart * lanes <= m.columns; v += apart * lanes) {
      for (int k = 0; k < apart; ++k) {
        const Vector<T> x = load<T>(row + v + k * lanes);
        sums[k] += x * x;
      }
    }
    for_vectors<T>(v, m.columns, [&](int64_t at, int count) {
      S last[lanes] = {};
      std::memcpy(last, row + at, count * sizeof(S));
      const Vector<T> x = load<T>(last);
      sums[0] += x * x;
    });
    const Vector<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    static_cast<T*>(m.out)[i] =
        T(total<T>(__builtin_convertvector(sum, typename Types<T>::wide)));
  }
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
