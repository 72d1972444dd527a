// Sums over K, or over the vocabulary, that a rule needs. Included by row_kernels.h.

namespace tropd {
namespace TROPD_ISA {
namespace {

template <class T, class SZ, class ST>
void row_sums(
    const SZ& z, const ST& t, const Rows& rows, const SumOptions& o, int64_t i,
    std::vector<T>& buffer) {
  T* c = static_cast<T*>(rows.coefs) + i;
  const int64_t cs = rows.coefs_stride;
  const T z_high = c[STUDENT_MAX * cs], z_log = c[STUDENT_LOG_SUM * cs];
  const T t_high = c[TEACHER_MAX * cs], t_log = c[TEACHER_LOG_SUM * cs];
  const T infinity = std::numeric_limits<T>::infinity();
  T threshold = -infinity;
  if (o.threshold_given) {
    threshold = c[THRESHOLD * cs];
  } else if (o.generator == AKL) {
    threshold = head_threshold<T>(t, t_high, t_log, rows.vocab, o.c, buffer);
  } else if (o.top_k > 0) {
    const int64_t k = o.top_k < rows.vocab ? o.top_k : rows.vocab;
    const T kth = kth_largest<T>(t, rows.vocab, k, buffer);
    c[THRESHOLD * cs] = threshold = with_margin<T>((kth - t_high) - t_log, rows.teacher.cap);
  }
  const Divergence<T> divergence(o.generator, o.c);
  std::vector<T>& on_k = buffer;  // log-probs on K, of the student and of the teacher in turn
  on_k.clear();
  typename Types<T>::wide sum[SUMS]{};
  auto pass = [&](auto whole) __attribute__((always_inline)) {
    constexpr bool WHOLE = decltype(whole)::value;
    for_blocks<T>(rows.vocab, [&](int64_t low, int64_t end) __attribute__((always_inline)) {
      Vector<T> part[SUMS]{};
      for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
        if (WHOLE) {  // else most of the student's row is not read, and the teacher's often just was
          z.next_block(v);
          t.next_block(v);
        }
        const Vector<T> lq = (get<T>(t, v, count) - t_high) - t_log, zero{};
        const auto member = lq >= threshold;
        if (!WHOLE && o.k_alone && __builtin_expect(!any<T>(member), 1)) return;
        auto on = [&](Vector<T> x) { return WHOLE ? x : member ? x : zero; };
        auto off = [&](Vector<T> x) { return WHOLE ? zero : member ? zero : x; };
        const Vector<T> lp = (get<T>(z, v, count) - z_high) - z_log;
        const Vector<T> p = exp<T>(lp), q = exp<T>(lq), q_k = on(q);
        part[STUDENT_MASS] += on(p);
        part[TEACHER_MASS] += q_k;
        part[STUDENT_TAIL] += off(p);
        part[TEACHER_TAIL] += off(q);
        part[SUM_FORWARD_KL] += product<T>(q_k, lq - lp);
        if (o.generator == AKL) {
          const Vector<T> gap = p > q ? p - q : q - p;
          part[VALUE] += on(gap);
          part[SLOPE] += off(gap);
        } else if (o.generator != NONE) {
          const Terms<T> f = terms<T>(divergence, lp, lq, p, q);
          part[VALUE] += on(f.value);
          part[SLOPE] += on(f.slope);
        }
        if (!WHOLE && o.top_k > 0) {
          for (int j = 0; j < count; ++j) {
            if (!member[j]) continue;
            on_k.push_back(lp[j]);
            on_k.push_back(lq[j]);
          }
        }
      });
      for (int j = 0; j < SUMS; ++j) flush<T>(sum[j], part[j]);
    });
  };
  if (threshold == -infinity) {  // every id belongs to K
    pass(std::true_type{});
  } else {
    pass(std::false_type{});
  }
  double result[SUMS];
  for (int j = 0; j < SUMS; ++j) result[j] = total<T>(sum[j]);
  if (o.k_alone) {
    for (auto [tail, mass] : {std::pair{STUDENT_TAIL, STUDENT_MASS}, {TEACHER_TAIL, TEACHER_MASS}}) {
      result[tail] = std::max(0.0, 1 - result[mass]);
    }
  }
  result[STUDENT_LOG_MASS] = std::log(result[STUDENT_MASS]);
  if (!on_k.empty()) {  // exact where the mass itself underflows
    double high = -infinity, mass = 0, value = 0;
    for (size_t j = 0; j < on_k.size(); j += 2) high = std::max(high, double(on_k[j]));
    if (high > -infinity) {
      for (size_t j = 0; j < on_k.size(); j += 2) {
        const double share = std::exp(on_k[j] - high);
        mass += share;
        if (share > 0) value += share * (on_k[j] - on_k[j + 1]);
      }
      result[STUDENT_LOG_MASS] = high + std::log(mass);
      if (o.on_renormalized) result[VALUE] = value / mass;
    }
  }
  T* out = static_cast<T*>(o.sums) + i;
  for (int j = 0; j < SUMS; ++j) out[j * o.sums_stride] = T(result[j]);
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
