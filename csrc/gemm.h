// Matrix products from bfloat16 to float32: torch has none on a CPU (its bf16 products round their result).
// On CPUs that multiply bfloat16, float32 products are four times slower; on the others ours takes bfloat16
// to float32 on its way into the cache.

#pragma once
#include <cstdint>

namespace tropd {

// All matrices are row-major with unit stride along a row; *_stride is from row to row.
struct Matrix {
  const uint16_t* data;  // bfloat16
  int64_t rows, cols, stride;
  const float* float32 = nullptr;  // in place of `data`, for products that take it
};

// Where a product goes: out = [sums +] product, in float32, or rounded once to bfloat16.
struct Output {
  void* out;
  int64_t stride;
  bool rounds;
  const float* sums = nullptr;  // (m, n), `out` itself or apart from it; null: none
  int64_t sums_stride = 0;
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
  bool takes_float32;  // for either operand
  // out (m, n) = a (m, k) @ b (n, k).T
  void (*nt)(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool&);
  // out (m, n) = a (m, k) @ b (k, n)
  void (*nn)(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool&);
  // out (m, n) = [sums +] a (k, m).T @ b (k, n)
  void (*tn)(const Matrix& a, const Matrix& b, const Output& out, const Pool&);
};

#if defined(__x86_64__)
extern const Products products_avx512_bf16;
extern const Products products_avx2;
// TROPD_NO_AMX: for assemblers that do not know its instructions; TROPD_EMULATE_AMX: see tiles.h.
#if defined(__linux__) && (defined(TROPD_EMULATE_AMX) || !defined(TROPD_NO_AMX))
#define TROPD_AMX
extern const Products products_amx;
#endif
#endif

}  // namespace tropd
