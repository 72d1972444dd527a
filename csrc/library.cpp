// The operators that tropd_kernels/rows/native_rows.py and products.py call, on libtorch's stable
// ABI. Everything handed over is checked here, by name; the kernels trust what they get.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sys/mman.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "gemm.h"
#include "pages.h"
#include "rows.h"

namespace tropd {
namespace {

#define TROPD_NAME_OF(kind, name) #name,
constexpr const char* generator_names[] = {TROPD_GENERATORS(TROPD_NAME_OF)};

std::vector<std::string> generators() { return {std::begin(generator_names), std::end(generator_names)}; }

Generator generator(int64_t kind, double c) {
  constexpr int last = int(std::size(generator_names)) - 1;
  if (kind < 0 || kind > last) fail("generator must lie between 0 and ", last, ", got ", kind);
  const bool mixes = kind == JSD || kind == SKEW_FORWARD || kind == SKEW_REVERSE || kind == TOPK_JSD;
  if ((mixes && !(c > 0 && c < 1)) || (kind == ALPHA && (c == 0 || c == 1))) {
    fail("generator ", kind, " is not defined at parameter ", c);
  }
  return Generator(kind);
}

// --- which kernels -------------------------------------------------------------------------------

std::vector<const Kernels*> runnable() {  // best first
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kernels_avx512);
  }
  if (avx2) kernels.push_back(&kernels_avx2);
#endif
  kernels.push_back(&kernels_portable);
  return kernels;
}

const Kernels*& chosen() {
  static const Kernels* kernels = runnable().front();
  return kernels;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.push_back(k->name);
  return names;
}

std::string use_instruction_set(std::string name) {
  for (const Kernels* k : runnable()) {
    if (name == k->name) {
      const std::string before = chosen()->name;
      chosen() = k;
      return before;
    }
  }
  fail("this CPU runs no kernels named ", name, "; instruction_sets() lists those that it runs");
}

// --- operators -----------------------------------------------------------------------------------

void statistics(
    Tensor student, std::optional<Tensor> teacher, std::optional<Tensor> bias,
    std::optional<Tensor> teacher_bias, std::vector<double> scales, Tensor labels, Tensor stats,
    Tensor coefs, bool mean_gap) {
  Rows rows = read_rows(student, teacher, bias, teacher_bias, scales, labels);
  const int64_t n = student.size(0);
  check_accumulator(stats, "stats", rows, STATS, n);
  check_accumulator(coefs, "coefs", rows, COEFS, n);
  rows.stats = stats.mutable_data_ptr();
  rows.coefs = coefs.mutable_data_ptr();
  rows.stats_stride = stride(stats);
  rows.coefs_stride = stride(coefs);
  rows.mean_gap = mean_gap;
  const Kernels& kernels = *chosen();
  torch::stable::parallel_for(
      0, n, 1, [&](int64_t begin, int64_t end) { kernels.statistics(rows, begin, end); });
}

void sums(
    Tensor student, Tensor teacher, std::optional<Tensor> bias, std::optional<Tensor> teacher_bias,
    std::vector<double> scales, Tensor labels, Tensor needed, Tensor coefs, Tensor sums, int64_t top_k,
    bool k_alone, int64_t kind, double c, bool threshold_given, bool on_renormalized) {
  Rows rows = read_rows(student, teacher, bias, teacher_bias, scales, labels);
  const int64_t n = student.size(0);
  check_accumulator(coefs, "coefs", rows, COEFS, n);
  check_accumulator(sums, "sums", rows, SUMS, n);
  check_vector(needed, "needed", n, ScalarType::Bool, "bool");
  if (top_k < 0) fail("top_k must be at least 0 (0: the whole vocabulary), got ", top_k);
  rows.coefs = coefs.mutable_data_ptr();
  rows.coefs_stride = stride(coefs);
  SumOptions o;
  o.needed = needed.const_data_ptr<bool>();
  o.sums = sums.mutable_data_ptr();
  o.sums_stride = stride(sums);
  o.top_k = top_k;
  o.k_alone = k_alone;
  o.threshold_given = threshold_given;
  o.on_renormalized = on_renormalized;
  o.generator = generator(kind, c);
  o.c = c;
  const Kernels& kernels = *chosen();
  torch::stable::parallel_for(
      0, n, 1, [&](int64_t begin, int64_t end) { kernels.sums(rows, o, begin, end); });
}

void gradient(
    Tensor student, std::optional<Tensor> teacher, std::optional<Tensor> bias,
    std::optional<Tensor> teacher_bias, std::vector<double> scales, Tensor labels, Tensor coefs,
    std::optional<Tensor> ids, std::optional<Tensor> added, Tensor out, bool top_k, int64_t kind, double c) {
  Rows rows = read_rows(student, teacher, bias, teacher_bias, scales, labels);
  const int64_t n = student.size(0);
  check_accumulator(coefs, "coefs", rows, COEFS, n);
  check_matrix(out, "out", n, rows.vocab);
  rows.coefs = const_cast<void*>(coefs.const_data_ptr());
  rows.coefs_stride = stride(coefs);
  GradientOptions o;
  o.out = out.mutable_data_ptr();
  o.out_stride = stride(out);
  o.out_type = element(out, "out");
  if ((o.out_type == Type::float64) != (rows.student.type == Type::float64)) {
    fail("out and student must both be float64, or neither");
  }
  o.top_k = top_k;
  o.generator = generator(kind, c);
  o.c = c;
  if (ids.has_value() != added.has_value()) fail("ids and added come together");
  if (ids.has_value()) {
    check_matrix(*ids, "ids", n, -1);
    check_accumulator(*added, "added", rows, n, ids->size(1));
    if (ids->scalar_type() != ScalarType::Long) fail("ids must be int64");
    if (!ids->is_contiguous() || !added->is_contiguous()) fail("ids and added must be contiguous");
    o.ids = ids->const_data_ptr<int64_t>();
    o.added = added->const_data_ptr();
    o.given = ids->size(1);
  }
  const Kernels& kernels = *chosen();
  torch::stable::parallel_for(
      0, n, 1, [&](int64_t begin, int64_t end) { kernels.gradient(rows, o, begin, end); });
}

// A matrix and the accumulators that its sums go to, both checked.
Columns columns(const Tensor& m, const char* name) {
  check_matrix(m, name, -1, -1);
  Columns c;
  c.n = m.size(0);
  c.columns = m.size(1);
  c.stride = m.stride(0);
  c.data = m.const_data_ptr();
  c.type = element(m, name);
  return c;
}

void check_sums(const Tensor& t, const char* name, const Columns& c, int64_t rows, int64_t columns) {
  check_matrix(t, name, rows, columns);
  const Accumulator acc = accumulator(c.type);
  if (t.scalar_type() != acc.type) fail(name, " must be ", acc.name, " for this matrix");
  if (!t.is_contiguous()) fail(name, " must be contiguous");
}

void column_sums(Tensor d_logits, Tensor hidden, Tensor out) {
  Columns c = columns(d_logits, "d_logits");
  check_sums(hidden, "hidden", c, 2, c.n);
  check_sums(out, "out", c, 3, c.columns);
  c.hidden = hidden.const_data_ptr();
  c.out = out.mutable_data_ptr();
  const Kernels& kernels = *chosen();
  torch::stable::parallel_for(
      0, (c.columns + COLUMNS - 1) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
        kernels.column_sums(c, begin * COLUMNS, std::min(end * COLUMNS, c.columns));
      });
}

void row_squares(Tensor matrix, Tensor out) {
  Columns c = columns(matrix, "matrix");
  const Accumulator acc = accumulator(c.type);
  check_vector(out, "out", c.n, acc.type, acc.name);
  c.out = out.mutable_data_ptr();
  const Kernels& kernels = *chosen();
  torch::stable::parallel_for(
      0, c.n, 256, [&](int64_t begin, int64_t end) { kernels.row_squares(c, begin, end); });
}

void elementary(int64_t which, Tensor from, Tensor to) {
  check_cpu(from, "input");
  check_cpu(to, "out");
  const Type type = element(from, "input");
  if (which < 0 || which > 2) fail("which must be 0 (exp), 1 (log1p) or 2 (tanh), got ", which);
  if (type == Type::bfloat16 || to.scalar_type() != from.scalar_type() || to.numel() != from.numel() ||
      !from.is_contiguous() || !to.is_contiguous()) {
    fail("input and out must be contiguous, of one size, both float32 or both float64");
  }
  chosen()->elementary(int(which), type, from.const_data_ptr(), to.mutable_data_ptr(), from.numel());
}

// Lets the system take a buffer's pages until it is written again; false where it has no such thing.
bool may_be_reclaimed(Tensor buffer) {
  check_cpu(buffer, "buffer");
  if (!buffer.is_contiguous() || buffer.scalar_type() != ScalarType::Byte) {
    fail("buffer must be contiguous, and uint8");
  }
#if defined(MADV_FREE)
  return advise(buffer.mutable_data_ptr(), buffer.numel(), MADV_FREE);
#else
  return false;
#endif
}

// Gives a buffer's pages back to the system, with what they hold.
void drop_pages(Tensor buffer) {
  check_cpu(buffer, "buffer");
  if (!buffer.is_contiguous()) fail("buffer must be contiguous");
  advise(buffer.mutable_data_ptr(), buffer.numel() * buffer.element_size(), MADV_DONTNEED);
}

// Makes a fresh buffer's pages on all threads.
void op_make_pages(Tensor buffer) {
  check_cpu(buffer, "buffer");
  if (!buffer.is_contiguous()) fail("buffer must be contiguous");
  constexpr int64_t PIECE = 1 << 21;
  char* first = static_cast<char*>(buffer.mutable_data_ptr());
  const int64_t bytes = buffer.numel() * buffer.element_size();
  torch::stable::parallel_for(0, (bytes + PIECE - 1) / PIECE, 1, [&](int64_t begin, int64_t end) {
    make_pages(first + begin * PIECE, std::min(end * PIECE, bytes) - begin * PIECE);
  });
}

// --- products ------------------------------------------------------------------------------------

std::vector<const Products*> products() {  // those of this CPU, best first
  std::vector<const Products*> found;
#if defined(TROPD_AMX)
  if (products_amx.available()) found.push_back(&products_amx);
#endif
#if defined(__x86_64__)
  if (products_avx512_bf16.available()) found.push_back(&products_avx512_bf16);
  if (products_avx2.available()) found.push_back(&products_avx2);
#endif
  return found;
}

const Products*& products_in_use() {  // null: none
  static const std::vector<const Products*> found = products();
  static const Products* best = found.empty() ? nullptr : found.front();
  return best;
}

std::vector<std::string> op_products() {
  std::vector<std::string> names;
  for (const Products* p : products()) names.push_back(p->name);
  return names;
}

std::string use_products(std::string name) {
  for (const Products* p : products()) {
    if (name == p->name) {
      const std::string before = products_in_use()->name;
      products_in_use() = p;
      return before;
    }
  }
  fail("this CPU has no products named ", name, "; products() lists those that it has");
}

Pool pool() {
  return {
      [](int64_t n, Body body, void* context) {
        torch::stable::parallel_for(
            0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
      },
      torch::stable::get_num_threads()};
}

Matrix matrix(const Tensor& t, const char* name) {
  check_matrix(t, name, -1, -1);
  const Products* products = products_in_use();
  const bool takes_float32 = products != nullptr && products->takes_float32;
  Matrix m = {nullptr, t.size(0), t.size(1), t.stride(0)};
  if (t.scalar_type() == ScalarType::BFloat16) {
    m.data = static_cast<const uint16_t*>(t.const_data_ptr());
  } else if (takes_float32 && t.scalar_type() == ScalarType::Float) {
    m.float32 = t.const_data_ptr<float>();
  } else {
    fail(name, " must be bfloat16", takes_float32 ? " or float32" : "");
  }
  return m;
}

void check_float(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  check_matrix(t, name, rows, cols);
  if (t.scalar_type() != ScalarType::Float) fail(name, " must be float32");
}

float* result(const Tensor& t, int64_t rows, int64_t cols) {
  check_float(t, "out", rows, cols);
  return t.mutable_data_ptr<float>();
}

const Products& check_gemm(int64_t inner_a, int64_t inner_b) {
  if (products_in_use() == nullptr) {
    fail("this CPU has neither AMX, AVX512-BF16 nor AVX2 with FMA, one of which the bfloat16 products need");
  }
  if (inner_a != inner_b) fail("a and b do not fit: inner sizes ", inner_a, " and ", inner_b);
  if (inner_a < 1) fail("a and b have an inner size of 0");
  return *products_in_use();
}

void op_gemm_nt(Tensor a, Tensor b, Tensor out) {
  const Matrix left = matrix(a, "a"), right = matrix(b, "b");
  const Products& products = check_gemm(left.cols, right.cols);
  float* to = result(out, left.rows, right.rows);
  if (out.numel() == 0) return;  // no memory to point into
  products.nt(left, right, to, stride(out), pool());
}

void op_gemm_nn(Tensor a, Tensor b, Tensor out) {
  const Matrix left = matrix(a, "a"), right = matrix(b, "b");
  const Products& products = check_gemm(left.cols, right.rows);
  float* to = result(out, left.rows, right.cols);
  if (out.numel() == 0) return;
  products.nn(left, right, to, stride(out), pool());
}

void op_gemm_tn(Tensor a, Tensor b, Tensor out, bool add, std::optional<Tensor> sums) {
  const Matrix left = matrix(a, "a"), right = matrix(b, "b");
  const Products& products = check_gemm(left.rows, right.rows);
  Output to{};
  to.rounds = out.scalar_type() == ScalarType::BFloat16;
  if (to.rounds) {
    check_matrix(out, "out", left.cols, right.cols);
    to.out = out.mutable_data_ptr();
    if (add) fail("out must be float32 to be added to");
  } else {
    to.out = result(out, left.cols, right.cols);
    if (sums.has_value()) fail("sums are for a bfloat16 out, which cannot hold them");
    if (add) sums = out;
  }
  to.stride = stride(out);
  if (sums.has_value()) {
    check_float(*sums, "sums", left.cols, right.cols);
    to.sums = sums->const_data_ptr<float>();
    to.sums_stride = stride(*sums);
  }
  if (out.numel() == 0) return;
  products.tn(left, right, to, pool());
}

}  // namespace
}  // namespace tropd

STABLE_TORCH_LIBRARY(tropd_native, m) {
  const std::string rows =
      "(Tensor student, Tensor? teacher, Tensor? bias, Tensor? teacher_bias, float[] scales, Tensor labels, ";
  m.def(("statistics" + rows + "Tensor(a!) stats, Tensor(b!) coefs, bool mean_gap=False) -> ()")
            .c_str());
  m.def(
      "sums(Tensor student, Tensor teacher, Tensor? bias, Tensor? teacher_bias, float[] scales, "
      "Tensor labels, Tensor needed, Tensor(a!) coefs, Tensor(b!) sums, int top_k, bool k_alone, "
      "int generator, float c, bool threshold_given=False, bool on_renormalized=False) -> ()");
  m.def(("gradient" + rows +
         "Tensor coefs, Tensor? ids, Tensor? added, Tensor(a!) out, bool top_k, int generator, "
         "float c) -> ()")
            .c_str());
  m.def("column_sums(Tensor d_logits, Tensor hidden, Tensor(a!) out) -> ()");
  m.def("row_squares(Tensor matrix, Tensor(a!) out) -> ()");
  m.def("elementary(int which, Tensor input, Tensor(a!) out) -> ()");
  m.def("gemm_nt(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("gemm_nn(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("gemm_tn(Tensor a, Tensor b, Tensor(a!) out, bool add, Tensor? sums=None) -> ()");
  m.def("may_be_reclaimed(Tensor(a!) buffer) -> bool");
  m.def("make_pages(Tensor(a!) buffer) -> ()");
  m.def("drop_pages(Tensor(a!) buffer) -> ()");
  m.def("generators() -> str[]");
  m.def("products() -> str[]");
  m.def("use_products(str name) -> str");
  m.def("instruction_sets() -> str[]");
  m.def("use_instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tropd_native, CompositeExplicitAutograd, m) {
  m.impl("statistics", TORCH_BOX(&tropd::statistics));
  m.impl("sums", TORCH_BOX(&tropd::sums));
  m.impl("gradient", TORCH_BOX(&tropd::gradient));
  m.impl("column_sums", TORCH_BOX(&tropd::column_sums));
  m.impl("row_squares", TORCH_BOX(&tropd::row_squares));
  m.impl("elementary", TORCH_BOX(&tropd::elementary));
  m.impl("gemm_nt", TORCH_BOX(&tropd::op_gemm_nt));
  m.impl("gemm_nn", TORCH_BOX(&tropd::op_gemm_nn));
  m.impl("gemm_tn", TORCH_BOX(&tropd::op_gemm_tn));
  m.impl("may_be_reclaimed", TORCH_BOX(&tropd::may_be_reclaimed));
  m.impl("make_pages", TORCH_BOX(&tropd::op_make_pages));
  m.impl("drop_pages", TORCH_BOX(&tropd::drop_pages));
  m.impl("generators", TORCH_BOX(&tropd::generators));
  m.impl("products", TORCH_BOX(&tropd::op_products));
  m.impl("use_products", TORCH_BOX(&tropd::use_products));
  m.impl("instruction_sets", TORCH_BOX(&tropd::instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&tropd::use_instruction_set));
}
