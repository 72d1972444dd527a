// The k-th largest logit of a row, or its head by mass. Included by row_kernels.h.

namespace tropd {
namespace TROPD_ISA {
namespace {

// The k-th largest of a row: candidates above the k-th largest so far gather in a buffer, which is
// cut back to k when full. After the first few blocks hardly a vector holds a candidate.
template <class T, class S>
T kth_largest(const S& source, int64_t vocab, int64_t k, std::vector<T>& buffer) {
  const size_t room = size_t(k) * 2 + 1024;
  T floor = -std::numeric_limits<T>::infinity();
  buffer.clear();
  auto cut = [&] {
    std::nth_element(buffer.begin(), buffer.begin() + (k - 1), buffer.end(), std::greater<T>());
    buffer.resize(k);
    floor = buffer[k - 1];
  };
  for_vectors<T>(0, vocab, [&](int64_t v, int count) __attribute__((always_inline)) {
    source.next_block(v);
    Vector<T> t = get<T>(source, v, count);
    if (__builtin_expect(!any<T>(t > floor), 1)) return;
    for (int i = 0; i < count; ++i) {
      if (t[i] > floor) buffer.push_back(t[i]);
    }
    if (buffer.size() >= room) cut();
  });
  if (int64_t(buffer.size()) < k) return -std::numeric_limits<T>::infinity();
  cut();
  return floor;
}

// The smallest log-prob in the smallest set of likeliest ids with at least `mass`.
template <class T, class S>
T head_threshold(const S& t, T high, T log_sum, int64_t vocab, double mass, std::vector<T>& lq) {
  lq.resize(vocab + Types<T>::lanes);
  for_vectors<T>(0, vocab, [&](int64_t v, int count) __attribute__((always_inline)) {
    const Vector<T> value = (get<T>(t, v, count) - high) - log_sum;
    const Vector<T> lowest = all<T>(-std::numeric_limits<T>::infinity());
    store<T>(lq.data() + v, value == value ? value : lowest);  // sort() needs an order
  });
  lq.resize(vocab);
  std::sort(lq.begin(), lq.end(), std::greater<T>());
  double before = 0;
  T threshold = std::numeric_limits<T>::infinity();
  for (T value : lq) {
    if (!(before < mass)) break;
    threshold = value;
    before += std::exp(double(value));
  }
  return threshold;
}

// Ids whose logit differs from the k-th largest in the last bits belong to K: the gradient pass may
// meet logits made again by a product that rounds otherwise. Excluded ids (-inf) never do.
template <class T>
T with_margin(T threshold, double cap) {
  T reach = std::abs(threshold) + T(1 + cap);
  T lower = threshold - 16 * std::numeric_limits<T>::epsilon() * reach;
  const T lowest = std::numeric_limits<T>::lowest();
  return lower >= lowest ? lower : lowest;  // a NaN from -inf, too
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
