// The last pass over a row: d loss / d logits from its coefficients, by the formula of
// tropd_kernels/rows/__init__.py. Included by row_kernels.h.

namespace tropd {
namespace TROPD_ISA {
namespace {

template <class T>
struct RowCoefs {
  T c[COEFS];
  bool idle, needs_teacher, generator_alone, rare;

  RowCoefs(const Rows& rows, int64_t i) {
    for (int j = 0; j < COEFS; ++j) c[j] = static_cast<const T*>(rows.coefs)[j * rows.coefs_stride + i];
    idle = true;
    for (int j = P; j < COEFS; ++j) idle = idle && c[j] == 0;
    const bool others = c[P_TOP_K] != c[P] || c[REVERSE] != 0 || c[Q] != 0;
    needs_teacher = others || c[GENERATOR] != 0;
    rare = c[ENTROPY_WEIGHT] != 0 || c[UNIFORM] != 0;
    generator_alone = c[GENERATOR] != 0 && !rare && !others;
  }
};

// d loss / d transformed logits, but for the label and the given ids, from transformed logits.
// GENERATOR_ALONE: with a generator over all ids and no other term of the teacher's, in a loop without
// tests.
template <class T, bool TEACHER, bool GENERATOR_ALONE>
TROPD_INLINE Vector<T> gradient_at(
    const RowCoefs<T>& row, const GradientOptions& o, const Divergence<T>& divergence, Vector<T> z,
    Vector<T> t) {
  const T* c = row.c;
  if (GENERATOR_ALONE) {
    const Vector<T> lp = (z - c[STUDENT_MAX]) - c[STUDENT_LOG_SUM], p = exp<T>(lp);
    const Vector<T> lq = (t - c[TEACHER_MAX]) - c[TEACHER_LOG_SUM], q = exp<T>(lq);
    return p * c[P] + terms<T>(divergence, lp, lq, p, q).slope * c[GENERATOR];
  }
  const Vector<T> lp = (z - c[STUDENT_MAX]) - c[STUDENT_LOG_SUM], p = exp<T>(lp), zero{};
  const Vector<T> lq = (t - c[TEACHER_MAX]) - c[TEACHER_LOG_SUM];
  const auto member = lq >= c[THRESHOLD];
  const bool on_k = TEACHER && (!o.top_k || any<T>(member));
  Vector<T> weight = all<T>(c[P]);
  if (on_k && o.top_k) weight = member ? all<T>(c[P_TOP_K]) : weight;
  Vector<T> d = p * weight;
  if (row.rare) {  // one test for both: most rows have neither
    if (c[ENTROPY_WEIGHT] != 0) d -= product<T>(p, (lp + c[MEAN_ENTROPY]) * c[ENTROPY_WEIGHT]);
    d -= c[UNIFORM];
  }
  if (!TEACHER) return d;
  if (on_k) {
    const Vector<T> q = exp<T>(lq);
    Vector<T> more = -(q * c[Q]);
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
  bool on_k;
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
  const Divergence<T> divergence(o.generator, o.c);
  // `out` may be the logits' own memory: what the special entries need is read first.
  special.clear();
  auto add = [&](int64_t id, bool on_k, T value) {
    if (id < 0 || id >= rows.vocab || (!on_k && value == 0)) return;
    special.push_back({id, on_k, value, z.one(id)[0], TEACHER ? t.one(id)[0] : T(0)});
  };
  add(rows.labels[i], false, -row.c[LABEL]);
  for (int64_t j = 0; j < o.given; ++j) {
    add(o.ids[i * o.given + j], true, static_cast<const T*>(o.added)[i * o.given + j]);
  }
  RowCoefs<T> row_on_k = row;
  row_on_k.c[P] = row.c[P_TOP_K];
  std::sort(special.begin(), special.end(), [](const Special<T>& a, const Special<T>& b) {
    return a.id < b.id;
  });
  auto pass = [&](auto generator_alone) __attribute__((always_inline)) {
    for_vectors<T>(0, rows.vocab, [&](int64_t v, int count) __attribute__((always_inline)) {
      z.next_block(v);
      if (TEACHER) t.next_block(v);
      const Vector<T> zv = get<T>(z, v, count), tv = TEACHER ? get<T>(t, v, count) : Vector<T>{};
      Vector<T> d = gradient_at<T, TEACHER, decltype(generator_alone)::value>(row, o, divergence, zv, tv);
      d = chain_rule<T, PLAIN>(d, zv, rows.student);
      if (count == Types<T>::lanes) {
        store<T>(out + v, d);
      } else {
        Out last[Types<T>::lanes];
        store<T>(last, d);
        std::memcpy(out + v, last, count * sizeof(Out));
      }
    });
  };
  if (TEACHER && row.generator_alone && !o.top_k) {
    pass(std::true_type{});
  } else {
    pass(std::false_type{});
  }
  for (size_t j = 0; j < special.size();) {
    const Special<T>& s = special[j];
    T added = 0;
    bool on_k = false;
    for (; j < special.size() && special[j].id == s.id; ++j) {
      added += special[j].added;
      on_k = on_k || special[j].on_k;
    }
    Vector<T> d = gradient_at<T, TEACHER, false>(
        on_k ? row_on_k : row, o, divergence, all<T>(s.z), all<T>(s.t));
    d += added;
    Out one[Types<T>::lanes];
    store<T>(one, chain_rule<T, PLAIN>(d, all<T>(s.z), rows.student));
    std::memcpy(out + s.id, one, sizeof(Out));
  }
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
