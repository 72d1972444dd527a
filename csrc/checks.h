// What the operators check of the tensors that they are given, and how they hand them to the kernels.
// Included by library.cpp.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "rows.h"

namespace tropd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ")";
  return text.str();
}

void check_cpu(const Tensor& t, const char* name) {
  if (!t.is_cpu()) fail("native kernels run on the CPU: move ", name, " there");
}

// A matrix (rows, cols) with unit stride along a row and rows that do not overlap; -1: any size.
void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  check_cpu(t, name);
  if (t.dim() != 2 || (rows >= 0 && t.size(0) != rows) || (cols >= 0 && t.size(1) != cols)) {
    fail(name, " has shape ", shape(t), ", expected (", rows < 0 ? "n" : std::to_string(rows), ", ",
         cols < 0 ? "m" : std::to_string(cols), ")");
  }
  const bool dense = t.size(1) <= 1 || t.stride(1) == 1;
  if (!dense || (t.size(0) > 1 && t.stride(0) < t.size(1))) {
    fail(name, " must have unit stride along its rows, and rows that do not overlap");
  }
}

void check_vector(const Tensor& t, const char* name, int64_t size, ScalarType type, const char* type_name) {
  check_cpu(t, name);
  if (t.dim() != 1 || t.size(0) != size) {
    fail(name, " has shape ", shape(t), ", expected (", size, ")");
  }
  if (t.scalar_type() != type) fail(name, " must be ", type_name);
  if (!t.is_contiguous()) fail(name, " must be contiguous");
}

Type element(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Double: return Type::float64;
    default: fail(name, " must be float32, bfloat16 or float64");
  }
}

struct Accumulator {
  ScalarType type;
  const char* name;
};

Accumulator accumulator(Type type) {
  if (type == Type::float64) return {ScalarType::Double, "float64"};
  return {ScalarType::Float, "float32"};
}

void check_accumulator(const Tensor& t, const char* name, const Rows& rows, int64_t height, int64_t n) {
  check_matrix(t, name, height, n);
  const Accumulator acc = accumulator(rows.student.type);
  if (t.scalar_type() != acc.type) fail(name, " must be ", acc.name, " for these logits");
}

Logits logits(
    const Tensor& t, const char* name, const std::optional<Tensor>& bias, const char* bias_name,
    double scale, double cap, double temperature) {
  Logits side;
  side.type = element(t, name);
  side.data = t.const_data_ptr();
  side.stride = t.stride(0);
  side.scale = scale;
  side.cap = cap;
  side.temperature = temperature;
  if (!(temperature > 0) || !(cap >= 0)) fail("temperature must be above 0, and a soft cap not below 0");
  if (bias.has_value()) {
    const bool wide = side.type == Type::float64;
    check_vector(*bias, bias_name, t.size(1), wide ? ScalarType::Double : ScalarType::Float,
                 wide ? "float64" : "float32");
    side.bias = bias->const_data_ptr();
  }
  return side;
}

// scales: scale and soft cap (0: none) of the student, of the teacher, and the temperature.
Rows read_rows(
    const Tensor& student, const std::optional<Tensor>& teacher, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& teacher_bias, const std::vector<double>& scales, const Tensor& labels) {
  check_matrix(student, "student", -1, -1);
  if (scales.size() != 5) fail("scales must hold 5 numbers, got ", scales.size());
  const int64_t n = student.size(0);
  Rows rows;
  rows.vocab = student.size(1);
  if (rows.vocab < 1) fail("student has no columns");
  rows.student = logits(student, "student", bias, "bias", scales[0], scales[1], scales[4]);
  if (teacher.has_value()) {
    check_matrix(*teacher, "teacher", n, rows.vocab);
    rows.teacher = logits(*teacher, "teacher", teacher_bias, "teacher_bias", scales[2], scales[3], scales[4]);
    if ((rows.teacher.type == Type::float64) != (rows.student.type == Type::float64)) {
      fail("teacher and student must both be float64, or neither");
    }
  }
  check_vector(labels, "labels", n, ScalarType::Long, "int64");
  rows.labels = labels.const_data_ptr<int64_t>();
  return rows;
}

int64_t stride(const Tensor& t) { return t.stride(0); }

}  // namespace
}  // namespace tropd
