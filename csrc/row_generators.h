// The f-divergences from their generators: the table of tropd_kernels/rows/generators.py. Included by
// row_kernels.h.

namespace tropd {
namespace TROPD_ISA {
namespace {

template <class T>
struct Terms {
  Vector<T> value, slope;  // q f(u) and p g
};

template <class T>
struct Divergence {
  Generator generator;
  T c, rest, log_c, log_rest;  // rest: 1 - c
  Divergence(Generator generator, double c)
      : generator(generator), c(T(generator == CHI2 ? 2.0 : c)), rest(T(1 - (generator == CHI2 ? 2.0 : c))),
        log_c(c > 0 && c < 1 ? T(std::log(c)) : 0), log_rest(c > 0 && c < 1 ? T(std::log1p(-c)) : 0) {}
};

// See the table in tropd_kernels/rows/generators.py.
template <class T>
TROPD_INLINE Terms<T> terms(
    const Divergence<T>& d, Vector<T> lp, Vector<T> lq, Vector<T> p, Vector<T> q) {
  const T c = d.c, rest = d.rest, infinity = std::numeric_limits<T>::infinity();
  switch (d.generator) {
    case JSD:
    case SKEW_FORWARD:
    case SKEW_REVERSE:
    case TOPK_JSD: {
      Vector<T> lm = d.generator == SKEW_REVERSE ? log_sum<T>(p * c, q * rest, lp + d.log_c, lq + d.log_rest)
                                                 : log_sum<T>(q * c, p * rest, lq + d.log_c, lp + d.log_rest);
      if (d.generator == JSD) {
        Vector<T> student = product<T>(p, lp - lm) * rest;
        return {product<T>(q, lq - lm) * c + student, student};
      }
      Vector<T> both = exp<T>(lp + lq - lm);  // p q / m
      both = both == both ? both : all<T>(0);
      if (d.generator == SKEW_REVERSE) {
        Vector<T> student = product<T>(p, lp - lm);
        return {student, student + both * rest};
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
    case TOPK_REVERSE_KL: {
      Vector<T> reverse = product<T>(p, lp - lq);
      return {reverse, reverse};
    }
    case TODI: {
      Vector<T> reverse = product<T>(p, lp - lq);
      Vector<T> share = T(1) / (exp<T>(lp - lq) + T(1));
      share = share == share ? share : all<T>(0.5);
      Vector<T> away = (T(1) - share) * reverse;
      return {share * product<T>(q, lq - lp) + away, away + (T(1) - share) * p - share * q};
    }
    case NONE:
    case AKL:
      return {all<T>(0), all<T>(0)};
  }
  __builtin_unreachable();  // a kind without a case does not compile (-Werror=switch)
}

}  // namespace
}  // namespace TROPD_ISA
}  // namespace tropd
