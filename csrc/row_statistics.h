// The first pass over a row: its maximum, and with it sums of exponentials, from which come
// log-normalisers, entropies and both KLs. Included by row_kernels.h.
//
// One pass: sums are of exp(z - base), where base is the largest logit so far, found block by block;
// when it grows the sums are brought to the new one. So a row comes from memory once, while the
// block before it is computed on. Sums run in float32 over at most BLOCK entries, then in float64:
// 150,000 terms of a softmax added in float32 lose the digits in which two close distributions differ.

namespace tropd {
namespace TROPD_ISA {
namespace {

// The largest logit so far, and what sums hold exp(z - base) by.
template <class T>
struct Base {
  T high = -std::numeric_limits<T>::infinity(), base = 0;
  double shift = 0, scale = 1;  // of the last growth: old base - new base, and its exponential

  // Takes in the block's maximum; true where sums have to be rescaled.
  bool grows(T block) {
    if (!(block > high)) return false;
    const bool first = high == -std::numeric_limits<T>::infinity();  // no sum yet but of 0 and NaN
    shift = double(base) - double(block);
    scale = first ? 1 : shift < Types<T>::smallest ? 0 : std::exp(shift);
    high = base = block;
    return true;
  }
  // A sum of weight * (difference of logits) whose differences grow by `more`. Weights that are now 0
  // drop out with whatever they were multiplied by; of the weights themselves a NaN stays.
  template <class Wide>
  void rescale(Wide& sum, const Wide& mass, double more) const {
    sum = scale == 0 ? Wide{} : (sum + mass * more) * scale;
  }
  template <class Wide>
  void rescale(Wide& mass) const {
    mass *= scale;
  }
};

// Passes over NaN.
template <class T, class S>
TROPD_INLINE T block_maximum(const S& source, int64_t low, int64_t end) {
  Vector<T> high = all<T>(-std::numeric_limits<T>::infinity());
  for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
    Vector<T> z = get<T>(source, v, count);
    high = z > high ? z : high;
  });
  T result = high[0];
  for (int i = 1; i < Types<T>::lanes; ++i) result = high[i] > result ? high[i] : result;
  return result;
}

template <class T, class SZ>
void student_statistics(const SZ& z, int64_t vocab, T* s, int64_t ss, T* c, int64_t cs, int64_t label) {
  typename Types<T>::wide mass{}, first{};
  Base<T> base;
  for_blocks<T>(vocab, [&](int64_t low, int64_t end) __attribute__((always_inline)) {
    if (base.grows(block_maximum<T>(z, low, end))) {
      base.rescale(first, mass, base.shift);
      base.rescale(mass);
    }
    Vector<T> m{}, f{};
    for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
      z.next_block(v);
      Vector<T> a = get<T>(z, v, count) - base.base, p = exp<T>(a);
      m += p;
      f += product<T>(p, a);
    });
    flush<T>(mass, m);
    flush<T>(first, f);
  });
  const double sum = total<T>(mass), log_sum = std::log(sum);
  c[STUDENT_MAX * cs] = base.high;
  c[STUDENT_LOG_SUM * cs] = T(log_sum);
  s[ENTROPY * ss] = c[MEAN_ENTROPY * cs] = T(log_sum - total<T>(first) / sum);
  s[LOG_PROB * ss] = label >= 0 && label < vocab ? T((z.one(label)[0] - base.high) - T(log_sum))
                                                 : std::numeric_limits<T>::quiet_NaN();
}

// Sums of both sides: weights, weights times logits, weights times the difference of the logits.
template <class T>
struct BothSums {
  Base<T> z_base, t_base;
  typename Types<T>::wide z_mass{}, t_mass{}, z_first{}, t_first{}, z_gap{}, t_gap{};

  bool finite() const { return std::isfinite(total<T>(z_gap)) && std::isfinite(total<T>(t_gap)); }

  template <class SZ, class ST>
  void add(const SZ& z, const ST& t, int64_t vocab) {
    for_blocks<T>(vocab, [&](int64_t low, int64_t end) __attribute__((always_inline)) {
      const bool z_grows = z_base.grows(block_maximum<T>(z, low, end));
      const bool t_grows = t_base.grows(block_maximum<T>(t, low, end));
      if (__builtin_expect(z_grows || t_grows, 0)) {
        const double more = (z_grows ? z_base.shift : 0) - (t_grows ? t_base.shift : 0);
        const Base<T> same, by_z = z_grows ? z_base : same, by_t = t_grows ? t_base : same;
        by_z.rescale(z_first, z_mass, by_z.shift);
        by_z.rescale(z_gap, z_mass, more);
        by_z.rescale(z_mass);
        by_t.rescale(t_first, t_mass, by_t.shift);
        by_t.rescale(t_gap, t_mass, more);
        by_t.rescale(t_mass);
      }
      Vector<T> zm{}, tm{}, zf{}, tf{}, zg{}, tg{};
      for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
        z.next_block(v);
        t.next_block(v);
        Vector<T> a = get<T>(z, v, count) - z_base.base, b = get<T>(t, v, count) - t_base.base;
        Vector<T> p = exp<T>(a), q = exp<T>(b), gap = a - b;
        zm += p;
        tm += q;
        zf += product<T>(p, a);
        tf += product<T>(q, b);
        zg += product<T>(p, gap);
        tg += product<T>(q, gap);
      });
      flush<T>(z_mass, zm);
      flush<T>(t_mass, tm);
      flush<T>(z_first, zf);
      flush<T>(t_first, tf);
      flush<T>(z_gap, zg);
      flush<T>(t_gap, tg);
    });
  }
};

template <class T, class SZ, class ST>
void both_statistics(
    const SZ& z, const ST& t, int64_t vocab, T* s, int64_t ss, T* c, int64_t cs, int64_t label) {
  BothSums<T> sums, again;
  sums.add(z, t, vocab);
  const bool finite = sums.finite();
  if (!finite) {
    // A weight that is 0 beside the row's maximum may not have been beside its block's, and a weight
    // decides whether an infinite difference counts: once more, from the maxima.
    again.z_base = sums.z_base;
    again.t_base = sums.t_base;
    again.add(z, t, vocab);
  }
  // Only the differences: the entropies stay, to the bit, those of a side alone.
  const BothSums<T>& gaps = finite ? sums : again;
  const auto &z_mass = sums.z_mass, &t_mass = sums.t_mass, &z_first = sums.z_first;
  const auto& t_first = sums.t_first;
  const T z_high = sums.z_base.high, t_high = sums.t_base.high;
  const double z_sum = total<T>(z_mass), t_sum = total<T>(t_mass);
  const double z_log = std::log(z_sum), t_log = std::log(t_sum);
  c[STUDENT_MAX * cs] = z_high;
  c[STUDENT_LOG_SUM * cs] = T(z_log);
  c[TEACHER_MAX * cs] = t_high;
  c[TEACHER_LOG_SUM * cs] = T(t_log);
  s[ENTROPY * ss] = c[MEAN_ENTROPY * cs] = T(z_log - total<T>(z_first) / z_sum);
  s[TEACHER_ENTROPY * ss] = T(t_log - total<T>(t_first) / t_sum);
  // E_p[lp - lq] and E_q[lq - lp], from differences: E_p[lp] - E_p[lq] would cancel
  const double z_mean = total<T>(gaps.z_gap) / total<T>(gaps.z_mass);
  const double t_mean = total<T>(gaps.t_gap) / total<T>(gaps.t_mass);
  s[REVERSE_KL * ss] = T(z_mean - (z_log - t_log));
  s[FORWARD_KL * ss] = T((z_log - t_log) - t_mean);
  // as the gradient forms it, without the log-sums, which cancel
  c[MEAN_REVERSE_KL * cs] = T(z_mean);
  const bool inside = label >= 0 && label < vocab;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  s[LOG_PROB * ss] = inside ? (z.one(label)[0] - z_high) - T(z_log) : nan;
  s[TEACHER_LOG_PROB * ss] = inside ? (t.one(label)[0] - t_high) - T(t_log) : nan;
}

// Mean over the ids of z - high. A pass of its own over a row that the cache still holds, so that rules
// without label smoothing pay nothing for it.
template <class T, class S>
T mean_gap(const S& z, int64_t vocab, T high) {
  typename Types<T>::wide sum{};
  for_blocks<T>(vocab, [&](int64_t low, int64_t end) __attribute__((always_inline)) {
    Vector<T> gaps{};
    for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
      Vector<T> a = get<T>(z, v, count) - high;
      for (int i = count; i < Types<T>::lanes; ++i) a[i] = 0;  // behind the row's end
      gaps += a;
    });
    flush<T>(sum, gaps);
  });
  return T(total<T>(sum) / double(vocab));
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
