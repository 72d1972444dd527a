// Matrix products from bfloat16 to float32 on CPUs that multiply bfloat16: torch has none (its bf16
// products round their result), and float32 products are four times slower.

#pragma once
#include <cstdint>

namespace tropd {

// All matrices are row-major with unit stride along a row; *_stride is from row to row.
struct Matrix {
  const uint16_t* data;  // bfloat16
  int64_t rows, cols, stride;
};

// torch's pool: splits [0, n) over its threads.
using Body = void (*)(int64_t begin, int64_t end, void* context);
struct Pool {
  void (*split)(int64_t n, Body, void* context);
  int64_t threads;
};

// The products of one instruction set. Every sum of a result has one order, whatever the number of
// threads.
struct Products {
  const char* name;
  bool (*available)();
  // out (m, n) = a (m, k) @ b (n, k).T
  void (*nt)(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool&);
  // out (m, n) = a (m, k) @ b (k, n)
  void (*nn)(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool&);
  // out (m, n) = [out +] a (k, m).T @ b (k, n)
  void (*tn)(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool add, const Pool&);
  // the same, rounded once to bfloat16
  void (*tn_rounded)(const Matrix& a, const Matrix& b, uint16_t* out, int64_t out_stride, const Pool&);
};

#if defined(__x86_64__)
extern const Products products_avx512_bf16;
#if defined(__linux__) && !defined(TROPD_NO_AMX)  // for assemblers that do not know its instructions
#define TROPD_AMX
extern const Products products_amx;
#endif
#endif

}  // namespace tropd
