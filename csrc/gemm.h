// Matrix products from bfloat16 to float32 on CPUs with AVX512-BF16: torch has none (its bf16
// products round their result), and float32 products are four times slower.

#pragma once
#include <cstdint>

namespace tropd {

// All matrices are row-major with unit stride along a row; *_stride is from row to row.
struct Matrix {
  const uint16_t* data;  // bfloat16
  int64_t rows, cols, stride;
};

// Splits [0, n) over the threads.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, Body, void* context);

// out (m, n) = a (m, k) @ b (n, k).T
void gemm_nt(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, ParallelFor);
// out (m, n) = a (m, k) @ b (k, n)
void gemm_nn(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, ParallelFor);
// out (m, n) = [out +] a (k, m).T @ b (k, n); to float32, or rounded once to bfloat16
void gemm_tn(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool add, ParallelFor);
void gemm_tn(const Matrix& a, const Matrix& b, uint16_t* out, int64_t out_stride, ParallelFor);

bool gemm_available();

}  // namespace tropd
