// What the row kernels are given: a chunk of rows, and the options that all of them share.
//
// A row is one token's logits. The kernels make the passes over the vocabulary; everything that is
// a few numbers a row (gate, rule, coefficients) stays in tropd_kernels/rows/rule.py.

#pragma once
#include <cstdint>

namespace tropd {

// Mirrors Stat and Coef of tropd_kernels/rows/layout.py, as far as the kernels use them.
enum Stat { LOG_PROB, TEACHER_LOG_PROB, ENTROPY, TEACHER_ENTROPY, FORWARD_KL, REVERSE_KL, STATS = 14 };
enum Coef {
  STUDENT_MAX, STUDENT_LOG_SUM, TEACHER_MAX, TEACHER_LOG_SUM, MEAN_ENTROPY, MEAN_REVERSE_KL,
  THRESHOLD, MEAN_GAP, P, P_TOP_K, REVERSE, ENTROPY_WEIGHT, Q, LABEL, GENERATOR, UNIFORM, COEFS
};
// Rows of the sums, in the order of rule.Sums.
enum Sum {
  TEACHER_MASS, STUDENT_MASS, TEACHER_TAIL, STUDENT_TAIL, STUDENT_LOG_MASS, SUM_FORWARD_KL, VALUE,
  SLOPE, SUMS
};

// The f-divergences of tropd_kernels/rows/generators.py, and AKL's gaps; with their names in the table of
// tropd_kernels/objectives/divergences.py, by which Python finds their numbers.
#define TROPD_GENERATORS(of) \
  of(NONE, none) of(JSD, jsd) of(SKEW_FORWARD, skew_forward) of(SKEW_REVERSE, skew_reverse) \
  of(TOPK_JSD, topk_jsd) of(ALPHA, alpha) of(CHI2, chi2) of(TOTAL_VARIATION, total_variation) \
  of(TODI, todi) of(MOPD, mopd) of(AKL, akl) of(TOPK_REVERSE_KL, topk_reverse_kl)
#define TROPD_ENUMERATOR(kind, name) kind,
enum Generator { TROPD_GENERATORS(TROPD_ENUMERATOR) };

enum class Type { float32, bfloat16, float64 };

// Raw logits and how they are transformed: cap(scale (logits + bias)) / temperature.
struct Logits {
  const void* data = nullptr;  // null: no dense teacher
  int64_t stride = 0;          // elements from row to row
  Type type = Type::float32;
  const void* bias = nullptr;  // in the accumulator's type
  double scale = 1, cap = 0, temperature = 1;  // cap 0: none
};

// Accumulators, stats, coefs and sums are float64 where the logits are, else float32.
struct Rows {
  int64_t vocab = 0;
  Logits student, teacher;
  const int64_t* labels = nullptr;
  void* stats = nullptr;  // (STATS, n), stride_stats from statistic to statistic
  void* coefs = nullptr;
  int64_t stats_stride = 0, coefs_stride = 0;
  bool mean_gap = false;  // the statistics include MEAN_GAP
};

struct SumOptions {
  const bool* needed = nullptr;  // (n,): rows to sum over; the others get masses of 1 and zeros
  void* sums = nullptr;          // (SUMS, n)
  int64_t sums_stride = 0;
  int64_t top_k = 0;             // 0: K is the whole vocabulary
  bool threshold_given = false;  // K, or the head of AKL, is lq >= THRESHOLD as coefs have it
  bool k_alone = false;          // nothing outside K is asked for: tails are 1 - mass
  bool on_renormalized = false;  // VALUE of TOPK_REVERSE_KL is a mean under the student on K
  Generator generator = NONE;
  double c = 0.5;                // its parameter; of AKL, the head's mass
};

struct GradientOptions {
  void* out = nullptr;  // may be the student's logits themselves, in any type
  int64_t out_stride = 0;
  Type out_type = Type::float32;
  bool top_k = false;  // K is lq >= THRESHOLD; else the whole vocabulary
  Generator generator = NONE;
  double c = 0.5;
  // Entries to add to a row's gradient (before the chain rule of the transform), from a given top-k.
  const int64_t* ids = nullptr;
  const void* added = nullptr;
  int64_t given = 0;  // how many a row
};

// A matrix of d_logits (n, columns), with two numbers a row, or a head's rows.
struct Columns {
  int64_t n = 0, columns = 0, stride = 0;
  const void* data = nullptr;
  Type type = Type::float32;
  const void* hidden = nullptr;  // (2, n), as out in the accumulator's type
  void* out = nullptr;           // (3, columns), of a head (n,)
};
// Columns whose sums are made together.
constexpr int COLUMNS = 1024;

// Rows begin to end of a chunk. Rows are independent: any split gives the same bits.
struct Kernels {
  const char* name;
  void (*statistics)(const Rows&, int64_t begin, int64_t end);
  void (*sums)(const Rows&, const SumOptions&, int64_t begin, int64_t end);
  void (*gradient)(const Rows&, const GradientOptions&, int64_t begin, int64_t end);
  // of columns [low, high), and rows [begin, end): independent, likewise
  void (*column_sums)(const Columns&, int64_t low, int64_t high);
  void (*row_squares)(const Columns&, int64_t begin, int64_t end);
  // exp (0), log1p (1) or tanh (2) of n values, for their accuracy test
  void (*elementary)(int which, Type, const void* from, void* to, int64_t n);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace tropd
