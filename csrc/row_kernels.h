// The passes over a row, in vectors of any width. Included by rows_*.cpp after vectors.h.
//
//   statistics   maximum; then sums of exponentials: log-normalisers, entropies, both KLs
//   sums         the k-th largest teacher logit; sums over K or over the vocabulary
//   gradient     d loss / d logits from the row's coefficients (the formula of rows/__init__.py)
//
// Sums run in float32 over at most BLOCK entries, then in float64: 150,000 terms of a softmax added
// in float32 lose the digits in which two close distributions differ. Log-probs are formed as
// (z - max) - log_sum, everywhere by the same operations. Products with a probability of 0 are 0,
// whatever the other factor.

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

template <class T, class S>
T row_maximum(const S& source, int64_t vocab) {
  Vector<T> high = all<T>(-std::numeric_limits<T>::infinity());
  for_vectors<T>(0, vocab, [&](int64_t v, int count) __attribute__((always_inline)) {
    Vector<T> z = get<T>(source, v, count);
    high = z > high ? z : high;
  });
  T result = high[0];
  for (int i = 1; i < Types<T>::lanes; ++i) result = high[i] > result ? high[i] : result;
  return result;
}

template <class T>
TROPD_INLINE Vector<T> product(Vector<T> weight, Vector<T> value) {  // 0 * anything = 0
  return weight > T(0) ? weight * value : all<T>(0);
}

// --- statistics ----------------------------------------------------------------------------------

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

// --- sums ----------------------------------------------------------------------------------------

template <class T>
struct Terms {
  Vector<T> value, slope;  // q f(u) and p g
};

struct Divergence {
  Generator generator;
  double c, log_c, log_1_c;
  Divergence(Generator generator, double c)
      : generator(generator), c(generator == CHI2 ? 2.0 : c),
        log_c(c > 0 && c < 1 ? std::log(c) : 0), log_1_c(c > 0 && c < 1 ? std::log1p(-c) : 0) {}
};

// See the table in tropd_kernels/rows/generators.py.
template <class T>
TROPD_INLINE Terms<T> terms(
    const Divergence& d, Vector<T> lp, Vector<T> lq, Vector<T> p, Vector<T> q) {
  const T c = T(d.c), rest = T(1 - d.c), infinity = std::numeric_limits<T>::infinity();
  switch (d.generator) {
    case JSD:
    case SKEW_FORWARD:
    case SKEW_REVERSE:
    case TOPK_JSD: {
      Vector<T> lm = logaddexp<T>(lq + T(d.log_c), lp + T(d.log_1_c));
      if (d.generator == JSD) {
        Vector<T> student = product<T>(p, lp - lm) * rest;
        return {product<T>(q, lq - lm) * c + student, student};
      }
      Vector<T> both = exp<T>(lp + lq - lm);  // p q / m
      both = both == both ? both : all<T>(0);
      if (d.generator == SKEW_REVERSE) {
        Vector<T> student = product<T>(p, lp - lm);
        return {student, student + both * c};
      }
      const T factor = d.generator == TOPK_JSD ? c : T(1);
      return {product<T>(q, lq - lm) * factor, both * (-factor * rest)};
    }
    case ALPHA:
    case CHI2: {
      Vector<T> exponent = lp * c + lq * rest;
      exponent = lp == -infinity && lq == -infinity ? all<T>(-infinity) : exponent;
      Vector<T> power = exp<T>(exponent);
      const T factor = d.generator == CHI2 ? 2 : 1;
      return {(power - p * c - q * rest) * (factor / (c * (c - 1))), (power - p) * (factor / (c - 1))};
    }
    case TOTAL_VARIATION: {
      Vector<T> gap = p - q;
      Vector<T> half = p * T(0.5);
      Vector<T> slope = gap > T(0) ? half : gap < T(0) ? -half : all<T>(0);
      return {(gap < T(0) ? -gap : gap) * T(0.5), slope};
    }
    case MOPD: {
      Vector<T> reverse = product<T>(p, lp - lq);
      return {reverse - p + q, reverse};
    }
    case TODI: {
      Vector<T> reverse = product<T>(p, lp - lq);
      Vector<T> share = T(1) / (exp<T>(lp - lq) + T(1));
      share = share == share ? share : all<T>(0.5);
      Vector<T> away = (T(1) - share) * reverse;
      return {share * product<T>(q, lq - lp) + away, away + (T(1) - share) * p - share * q};
    }
    default:
      return {all<T>(0), all<T>(0)};
  }
}

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
  if (o.generator == AKL) {
    threshold = head_threshold<T>(t, t_high, t_log, rows.vocab, o.c, buffer);
  } else if (o.top_k > 0) {
    const int64_t k = o.top_k < rows.vocab ? o.top_k : rows.vocab;
    const T kth = kth_largest<T>(t, rows.vocab, k, buffer);
    c[THRESHOLD * cs] = threshold = with_margin<T>((kth - t_high) - t_log, rows.teacher.cap);
  }
  const bool everything = threshold == -infinity;  // then masks are not needed
  const Divergence divergence(o.generator, o.c);
  std::vector<T>& on_k = buffer;  // log-probs of the student on K
  on_k.clear();
  typename Types<T>::wide sum[SUMS]{};
  for_blocks<T>(rows.vocab, [&](int64_t low, int64_t end) __attribute__((always_inline)) {
    Vector<T> part[SUMS]{};
    for_vectors<T>(low, end, [&](int64_t v, int count) __attribute__((always_inline)) {
      const Vector<T> lq = (get<T>(t, v, count) - t_high) - t_log;
      const auto member = lq >= threshold;
      if (o.k_alone && !everything && __builtin_expect(!any<T>(member), 1)) return;
      const Vector<T> lp = (get<T>(z, v, count) - z_high) - z_log;
      const Vector<T> p = exp<T>(lp), q = exp<T>(lq), zero{};
      const Vector<T> p_k = member ? p : zero, q_k = member ? q : zero;
      part[STUDENT_MASS] += p_k;
      part[TEACHER_MASS] += q_k;
      part[STUDENT_TAIL] += member ? zero : p;
      part[TEACHER_TAIL] += member ? zero : q;
      part[SUM_FORWARD_KL] += product<T>(q_k, lq - lp);
      if (o.generator == AKL) {
        const Vector<T> gap = p > q ? p - q : q - p;
        part[VALUE] += member ? gap : zero;
        part[SLOPE] += member ? zero : gap;
      } else if (o.generator != NONE) {
        const Terms<T> f = terms<T>(divergence, lp, lq, p, q);
        part[VALUE] += member ? f.value : zero;
        part[SLOPE] += member ? f.slope : zero;
      }
      if (!everything && o.top_k > 0) {
        for (int j = 0; j < count; ++j) {
          if (member[j]) on_k.push_back(lp[j]);
        }
      }
    });
    for (int j = 0; j < SUMS; ++j) flush<T>(sum[j], part[j]);
  });
  double result[SUMS];
  for (int j = 0; j < SUMS; ++j) result[j] = total<T>(sum[j]);
  if (o.k_alone) {
    for (auto [tail, mass] : {std::pair{STUDENT_TAIL, STUDENT_MASS}, {TEACHER_TAIL, TEACHER_MASS}}) {
      result[tail] = std::max(0.0, 1 - result[mass]);
    }
  }
  result[STUDENT_LOG_MASS] = std::log(result[STUDENT_MASS]);
  if (!on_k.empty()) {  // exact where the mass itself underflows
    const double high = *std::max_element(on_k.begin(), on_k.end());
    double mass = 0;
    for (T lp : on_k) mass += std::exp(lp - high);
    if (high > -infinity) result[STUDENT_LOG_MASS] = high + std::log(mass);
  }
  T* out = static_cast<T*>(o.sums) + i;
  for (int j = 0; j < SUMS; ++j) out[j * o.sums_stride] = T(result[j]);
}

// --- gradient ------------------------------------------------------------------------------------

template <class T>
struct RowCoefs {
  T c[COEFS];
  bool idle, needs_teacher;

  RowCoefs(const Rows& rows, int64_t i) {
    for (int j = 0; j < COEFS; ++j) c[j] = static_cast<const T*>(rows.coefs)[j * rows.coefs_stride + i];
    idle = true;
    for (int j = P; j < COEFS; ++j) idle = idle && c[j] == 0;
    needs_teacher = c[P_TOP_K] != 0 || c[REVERSE] != 0 || c[Q] != 0 || c[GENERATOR] != 0;
  }
};

// d loss / d transformed logits, but for the label and the given ids, from transformed logits.
template <class T, bool TEACHER>
TROPD_INLINE Vector<T> gradient_at(
    const RowCoefs<T>& row, const GradientOptions& o, const Divergence& divergence, Vector<T> z,
    Vector<T> t) {
  const T* c = row.c;
  const Vector<T> lp = (z - c[STUDENT_MAX]) - c[STUDENT_LOG_SUM], p = exp<T>(lp), zero{};
  Vector<T> d = p * c[P];
  if (c[ENTROPY_WEIGHT] != 0) d -= product<T>(p, (lp + c[MEAN_ENTROPY]) * c[ENTROPY_WEIGHT]);
  if (!TEACHER) return d;
  const Vector<T> lq = (t - c[TEACHER_MAX]) - c[TEACHER_LOG_SUM];
  const auto member = lq >= c[THRESHOLD];
  if (!o.top_k || any<T>(member)) {
    const Vector<T> q = exp<T>(lq);
    Vector<T> more = p * c[P_TOP_K] - q * c[Q];
    if (o.generator != NONE && c[GENERATOR] != 0) {
      more += terms<T>(divergence, lp, lq, p, q).slope * c[GENERATOR];
    }
    d += o.top_k ? (member ? more : zero) : more;
  }
  if (c[REVERSE] != 0) {
    const Vector<T> gap = (z - c[STUDENT_MAX]) - (t - c[TEACHER_MAX]);
    d += product<T>(p, (gap - c[MEAN_REVERSE_KL]) * c[REVERSE]);
  }
  return d;
}

template <class T, bool PLAIN>
TROPD_INLINE Vector<T> chain_rule(Vector<T> d, Vector<T> z, const Logits& how) {
  if (PLAIN) return d;
  if (how.cap != 0) {
    const Vector<T> tanh = z * T(how.temperature / how.cap);
    d = d * (T(1) - tanh * tanh);
  }
  return d * T(how.scale / how.temperature);
}

template <class T>
struct Special {  // an entry with something of its own: the label, the ids of a given top-k
  int64_t id;
  T added, z, t;
};

template <class T, bool PLAIN, bool TEACHER, class SZ, class ST, class Out>
void row_gradient(
    const SZ& z, const ST& t, const Rows& rows, const GradientOptions& o, int64_t i, Out* out,
    std::vector<Special<T>>& special) {
  const RowCoefs<T> row(rows, i);
  if (row.idle) {  // its logits may hold anything, NaN too
    std::memset(out, 0, rows.vocab * sizeof(Out));
    return;
  }
  const Divergence divergence(o.generator, o.c);
  // `out` may be the logits' own memory: what the special entries need is read first.
  special.clear();
  auto add = [&](int64_t id, T value) {
    if (id < 0 || id >= rows.vocab || value == 0) return;
    special.push_back({id, value, z.one(id)[0], TEACHER ? t.one(id)[0] : T(0)});
  };
  add(rows.labels[i], -row.c[LABEL]);
  for (int64_t j = 0; j < o.given; ++j) {
    add(o.ids[i * o.given + j], static_cast<const T*>(o.added)[i * o.given + j]);
  }
  std::sort(special.begin(), special.end(), [](const Special<T>& a, const Special<T>& b) {
    return a.id < b.id;
  });
  for_vectors<T>(0, rows.vocab, [&](int64_t v, int count) __attribute__((always_inline)) {
    const Vector<T> zv = get<T>(z, v, count), tv = TEACHER ? get<T>(t, v, count) : Vector<T>{};
    Vector<T> d = gradient_at<T, TEACHER>(row, o, divergence, zv, tv);
    d = chain_rule<T, PLAIN>(d, zv, rows.student);
    if (count == Types<T>::lanes) {
      store<T>(out + v, d);
    } else {
      Out last[Types<T>::lanes];
      store<T>(last, d);
      std::memcpy(out + v, last, count * sizeof(Out));
    }
  });
  for (size_t j = 0; j < special.size();) {
    const Special<T>& s = special[j];
    Vector<T> d = gradient_at<T, TEACHER>(row, o, divergence, all<T>(s.z), all<T>(s.t));
    for (; j < special.size() && special[j].id == s.id; ++j) d += special[j].added;
    Out one[Types<T>::lanes];
    store<T>(one, chain_rule<T, PLAIN>(d, all<T>(s.z), rows.student));
    std::memcpy(out + s.id, one, sizeof(Out));
  }
}

// --- from run-time types to the templates above ----------------------------------------------------

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void with_element(Type type, const F& f) {  // of float32 accumulators
  if (type == Type::bfloat16) {
    f(Tag<bf16>{});
  } else {
    f(Tag<float>{});
  }
}

bool is_plain(const Logits& how) {
  return how.bias == nullptr && how.scale == 1 && how.cap == 0 && how.temperature == 1;
}

// f(accumulator, student element, teacher element, plain)
template <class F>
void with_types(const Rows& rows, const F& f) {
  const bool plain = is_plain(rows.student) && is_plain(rows.teacher);
  auto call = [&](auto acc, auto student, auto teacher) {
    if (plain) {
      f(acc, student, teacher, std::true_type{});
    } else {
      f(acc, student, teacher, std::false_type{});
    }
  };
  if (rows.student.type == Type::float64) {
    call(Tag<double>{}, Tag<double>{}, Tag<double>{});
    return;
  }
  with_element(rows.student.type, [&](auto student) {
    with_element(rows.teacher.type, [&](auto teacher) { call(Tag<float>{}, student, teacher); });
  });
}

void statistics(const Rows& rows, int64_t begin, int64_t end) {
  with_types(rows, [&](auto acc, auto student, auto teacher, auto plain) {
    using T = typename decltype(acc)::type;
    using Student = Source<T, typename decltype(student)::type, decltype(plain)::value>;
    using Teacher = Source<T, typename decltype(teacher)::type, decltype(plain)::value>;
    for (int64_t i = begin; i < end; ++i) {
      T* s = static_cast<T*>(rows.stats) + i;
      T* c = static_cast<T*>(rows.coefs) + i;
      const Student z(rows.student, i);
      if (rows.teacher.data == nullptr) {
        student_statistics<T>(z, rows.vocab, s, rows.stats_stride, c, rows.coefs_stride, rows.labels[i]);
      } else {
        both_statistics<T>(z, Teacher(rows.teacher, i), rows.vocab, s, rows.stats_stride, c,
                           rows.coefs_stride, rows.labels[i]);
      }
    }
  });
}

void sums(const Rows& rows, const SumOptions& o, int64_t begin, int64_t end) {
  with_types(rows, [&](auto acc, auto student, auto teacher, auto plain) {
    using T = typename decltype(acc)::type;
    using Student = Source<T, typename decltype(student)::type, decltype(plain)::value>;
    using Teacher = Source<T, typename decltype(teacher)::type, decltype(plain)::value>;
    std::vector<T> buffer;
    for (int64_t i = begin; i < end; ++i) {
      if (o.needed[i]) {
        row_sums<T>(Student(rows.student, i), Teacher(rows.teacher, i), rows, o, i, buffer);
        continue;
      }
      T* out = static_cast<T*>(o.sums) + i;
      for (int j = 0; j < SUMS; ++j) {
        out[j * o.sums_stride] = j == STUDENT_MASS || j == TEACHER_MASS ? T(1) : T(0);
      }
    }
  });
}

void gradient(const Rows& rows, const GradientOptions& o, int64_t begin, int64_t end) {
  with_types(rows, [&](auto acc, auto student, auto teacher, auto plain) {
    using T = typename decltype(acc)::type;
    constexpr bool PLAIN = decltype(plain)::value;
    using Student = Source<T, typename decltype(student)::type, PLAIN>;
    using Teacher = Source<T, typename decltype(teacher)::type, PLAIN>;
    std::vector<Special<T>> special;
    auto run = [&](auto* out) {
      for (int64_t i = begin; i < end; ++i) {
        const Student z(rows.student, i);
        const Teacher t(rows.teacher, rows.teacher.data == nullptr ? 0 : i);
        // A row whose coefficients do not need the teacher's logits does not read them.
        if (rows.teacher.data != nullptr && RowCoefs<T>(rows, i).needs_teacher) {
          row_gradient<T, PLAIN, true>(z, t, rows, o, i, out + i * o.out_stride, special);
        } else {
          row_gradient<T, PLAIN, false>(z, t, rows, o, i, out + i * o.out_stride, special);
        }
      }
    };
    if constexpr (sizeof(T) == 8) {
      run(static_cast<double*>(o.out));
    } else if (o.out_type == Type::bfloat16) {
      run(static_cast<bf16*>(o.out));
    } else {
      run(static_cast<float*>(o.out));
    }
  });
}

template <class T>
void elementary_of(int which, const T* from, T* to, int64_t n) {
  for_vectors<T>(0, n, [&](int64_t v, int count) {
    T values[Types<T>::lanes] = {};
    std::memcpy(values, from + v, count * sizeof(T));
    Vector<T> x = load<T>(values);
    store<T>(values, which == 0 ? exp<T>(x) : which == 1 ? log1p<T>(x) : tanh<T>(x));
    std::memcpy(to + v, values, count * sizeof(T));
  });
}

void elementary(int which, Type type, const void* from, void* to, int64_t n) {
  if (type == Type::float64) {
    elementary_of(which, static_cast<const double*>(from), static_cast<double*>(to), n);
  } else {
    elementary_of(which, static_cast<const float*>(from), static_cast<float*>(to), n);
  }
}

}  // namespace
}  // namespace TROPD_ISA

const Kernels TROPD_KERNELS = {
    TROPD_NAME, TROPD_ISA::statistics, TROPD_ISA::sums, TROPD_ISA::gradient, TROPD_ISA::elementary};

}  // namespace tropd
