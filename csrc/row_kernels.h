// The passes over a row, in vectors of any width: from run-time types to templates, and the table of
// kernels. Included by rows_*.cpp after vectors.h.
//
// Everywhere: log-probs are formed as (z - max) - log_sum, by the same operations; a product with a
// probability of 0 is 0, whatever the other factor.

#include "row_source.h"
#include "row_statistics.h"
#include "row_generators.h"
#include "row_search.h"
#include "row_sums.h"
#include "row_gradient.h"
#include "column_sums.h"

namespace tropd {
namespace TROPD_ISA {
namespace {

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
      if (rows.mean_gap) {
        c[MEAN_GAP * rows.coefs_stride] = mean_gap<T>(z, rows.vocab, c[STUDENT_MAX * rows.coefs_stride]);
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

// f(accumulator, element)
template <class F>
void with_type(const Columns& m, const F& f) {
  if (m.type == Type::float64) {
    f(Tag<double>{}, Tag<double>{});
  } else {
    with_element(m.type, [&](auto element) { f(Tag<float>{}, element); });
  }
}

void column_sums(const Columns& m, int64_t low, int64_t high) {
  with_type(m, [&](auto acc, auto element) {
    column_sums_of<typename decltype(acc)::type, typename decltype(element)::type>(m, low, high);
  });
}

void row_squares(const Columns& m, int64_t begin, int64_t end) {
  with_type(m, [&](auto acc, auto element) {
    row_squares_of<typename decltype(acc)::type, typename decltype(element)::type>(m, begin, end);
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
    TROPD_NAME, TROPD_ISA::statistics, TROPD_ISA::sums, TROPD_ISA::gradient, TROPD_ISA::column_sums,
    TROPD_ISA::row_squares, TROPD_ISA::elementary};

}  // namespace tropd
