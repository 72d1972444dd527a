// The first passes over a row: maximum; then sums of exponentials, from which come log-normalisers,
// entropies and both KLs. Included by row_kernels.h.
//
// Sums run in float32 over at most BLOCK entries, then in float64: 150,000 terms of a softmax added
// in float32 lose the digits in which two close distributions differ.

namespace tropd {
namespace TROPD_ISA {
namespace {

template <class T, class SZ>
void student_statistics(const SZ& z, int64_t vocab, T* s, int64_t ss, T* c, int64_t cs, int64_t label) {
  const T high = row_maximum<T>(z, vocab);
  typename Types<T>::wide mass{}, first{};
  for_blocks<T>(vocab, [&](int64_t low, int64_t end) __attribute__((always_inline)) {
    Vector<T> m{}, f{};
    for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
      Vector<T> a = get<T>(z, v, count) - high, p = exp<T>(a);
      m += p;
      f += product<T>(p, a);
    });
    flush<T>(mass, m);
    flush<T>(first, f);
  });
  const double sum = total<T>(mass), log_sum = std::log(sum);
  c[STUDENT_MAX * cs] = high;
  c[STUDENT_LOG_SUM * cs] = T(log_sum);
  s[ENTROPY * ss] = c[MEAN_ENTROPY * cs] = T(log_sum - total<T>(first) / sum);
  s[LOG_PROB * ss] = label >= 0 && label < vocab ? T((z.one(label)[0] - high) - T(log_sum))
                                                 : std::numeric_limits<T>::quiet_NaN();
}

template <class T, class SZ, class ST>
void both_statistics(
    const SZ& z, const ST& t, int64_t vocab, T* s, int64_t ss, T* c, int64_t cs, int64_t label) {
  const T z_high = row_maximum<T>(z, vocab), t_high = row_maximum<T>(t, vocab);
  typename Types<T>::wide z_mass{}, t_mass{}, z_first{}, t_first{}, z_gap{}, t_gap{};
  for_blocks<T>(vocab, [&](int64_t low, int64_t end) __attribute__((always_inline)) {
    Vector<T> zm{}, tm{}, zf{}, tf{}, zg{}, tg{};
    for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
      Vector<T> a = get<T>(z, v, count) - z_high, b = get<T>(t, v, count) - t_high;
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
  const double z_sum = total<T>(z_mass), t_sum = total<T>(t_mass);
  const double z_log = std::log(z_sum), t_log = std::log(t_sum);
  c[STUDENT_MAX * cs] = z_high;
  c[STUDENT_LOG_SUM * cs] = T(z_log);
  c[TEACHER_MAX * cs] = t_high;
  c[TEACHER_LOG_SUM * cs] = T(t_log);
  s[ENTROPY * ss] = c[MEAN_ENTROPY * cs] = T(z_log - total<T>(z_first) / z_sum);
  s[TEACHER_ENTROPY * ss] = T(t_log - total<T>(t_first) / t_sum);
  // E_p[lp - lq] and E_q[lq - lp], from differences: E_p[lp] - E_p[lq] would cancel
  const double z_mean = total<T>(z_gap) / z_sum, t_mean = total<T>(t_gap) / t_sum;
  s[REVERSE_KL * ss] = T(z_mean - (z_log - t_log));
  s[FORWARD_KL * ss] = T((z_log - t_log) - t_mean);
  // as the gradient forms it, without the log-sums, which cancel
  c[MEAN_REVERSE_KL * cs] = T(z_mean);
  const bool inside = label >= 0 && label < vocab;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  s[LOG_PROB * ss] = inside ? (z.one(label)[0] - z_high) - T(z_log) : nan;
  s[TEACHER_LOG_PROB * ss] = inside ? (t.one(label)[0] - t_high) - T(t_log) : nan;
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
