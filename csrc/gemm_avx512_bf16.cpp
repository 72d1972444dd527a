// bfloat16 products on AVX512-BF16 (Intel from Cooper Lake on, AMD from Zen 4 on).
//
// One micro-kernel: a tile of 6 x 64 sums in 24 registers, to which vdpbf16ps adds the products of
// two steps of k at once. B is packed in panels of 64 columns, two steps of k side by side; A is
// read in pairs of k, from memory as it lies where pairs are neighbours there, else packed.
//
//   gemm_nt   logits = hidden @ weight.T: B's panels are the head's rows, each packed once per call
//   gemm_nn   d_hidden = d_logits @ weight: steps of k are ids; a block of d_logits stays in the
//             cache while the columns of d_hidden go by
//   gemm_tn   d_weight += d_logits.T @ hidden: hidden is packed once for all threads
//
// vdpbf16ps treats subnormals as zero and adds in float32. Every sum of a result has one order,
// whatever the number of threads.

#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "target.h"
TROPD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "gemm_pack.h"

namespace tropd {
namespace {

constexpr int MR = 6, NR = 64;
constexpr int64_t KC = 2048;  // steps of k whose panel of B (256 KiB) is packed at once

// (ROWS, cols) sums over `pairs` pairs of k. a: pair p of row i at a + i * row + p * step.
template <int ROWS, class To>
inline __attribute__((always_inline)) void tile(
    int64_t pairs, const uint16_t* a, int64_t row, int64_t step, const uint16_t* b, const To& to,
    int64_t cols) {
  __m512 sum[ROWS][4];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  if constexpr (To::adds) {  // so that the old sums are there when the loop ends
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < 4; ++j) _mm_prefetch(to.sums + i * to.sums_stride + 16 * j, _MM_HINT_T0);
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh column[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      column[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + p * 2 * NR + j * 32));
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      uint32_t pair;
      std::memcpy(&pair, a + i * row + p * step, 4);
      const __m512bh value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(pair)));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], value, column[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t left = cols - 16 * j;
      if (left <= 0) continue;
      const __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
      const To here = to.at(i, 16 * j);
      const __m512 total = plus_sums(here, sum[i][j], mask);
      if constexpr (To::rounds) {
        _mm256_mask_storeu_epi16(here.out, mask, to_bf16(total));
      } else {
        _mm512_mask_storeu_ps(here.out, mask, total);
      }
    }
  }
}

template <class To>
void tiles(
    int rows, int64_t pairs, const uint16_t* a, int64_t row, int64_t step, const uint16_t* b, const To& to,
    int64_t cols) {
  switch (rows) {
    case 1: return tile<1>(pairs, a, row, step, b, to, cols);
    case 2: return tile<2>(pairs, a, row, step, b, to, cols);
    case 3: return tile<3>(pairs, a, row, step, b, to, cols);
    case 4: return tile<4>(pairs, a, row, step, b, to, cols);
    case 5: return tile<5>(pairs, a, row, step, b, to, cols);
    default: return tile<6>(pairs, a, row, step, b, to, cols);
  }
}

// Panel of B from rows that are steps of k: to[p][column] = (b[2p][column], b[2p + 1][column]).
// Columns beyond `cols`, and an odd last step's partner, are 0.
void pack_rows(const uint16_t* b, int64_t stride, int64_t k, int64_t cols, uint16_t* to) {
  for (int64_t p = 0; p < k; p += 2) {
    for (int j = 0; j < 4; ++j) {
      const int64_t left = std::min<int64_t>(16, cols - 16 * j);
      const __mmask16 mask = left <= 0 ? 0 : __mmask16((1u << left) - 1);
      const __m512i pairs = two_steps(b + p * stride + 16 * j, stride, mask, p + 1 < k);
      _mm512_store_si512(to + p * NR + 32 * j, pairs);
    }
  }
}

// Panel of B from rows that are columns of the product: to[p][column] = (b[column][2p], ...[2p + 1]).
void pack_columns(const uint16_t* b, int64_t stride, int64_t k, int64_t cols, uint16_t* to) {
  for (int j = 0; j < 4; ++j) {
    for (int64_t first = 0; first < k; first += 32) {
      const int64_t left = std::min<int64_t>(32, k - first);
      const __mmask32 mask = left == 32 ? 0xffffffffu : (1u << left) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t column = 16 * j + i;
        r[i] = column < cols ? _mm512_maskz_loadu_epi16(mask, b + column * stride + first)
                             : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t p = 0; 2 * p < left; ++p) {
        _mm512_store_si512(to + (first / 2 + p) * 2 * NR + 32 * j, r[p]);
      }
    }
  }
}

// A's pairs for `m` columns of a (k, m), as to[p][row]: the rows of a.T with two steps of k.
void pack_transposed(const uint16_t* a, int64_t stride, int64_t k, int64_t m, uint16_t* to) {
  for (int64_t p = 0; p < k; p += 2) {
    for (int64_t j = 0; j < m; j += 16) {
      const int64_t left = std::min<int64_t>(16, m - j);
      const __mmask16 mask = __mmask16((1u << left) - 1);
      const __m512i pairs = two_steps(a + p * stride + j, stride, mask, p + 1 < k);
      _mm512_mask_storeu_epi32(to + p * m + 2 * j, mask, pairs);
    }
  }
}

// Rows of A as they lie, or, for an odd k, a copy with a last partner of 0.
struct Pairs {
  const uint16_t* data;
  int64_t stride;
  Buffer<uint16_t> copy;

  Pairs(const Matrix& a, int64_t from, int64_t k) : data(a.data + from), stride(a.stride) {
    if (k % 2 == 0) return;
    stride = k + 1;
    copy = buffer(a.rows * stride);
    for (int64_t i = 0; i < a.rows; ++i) {
      std::memcpy(copy.get() + i * stride, a.data + i * a.stride + from, k * 2);
      copy.get()[i * stride + k] = 0;
    }
    data = copy.get();
  }
};

// Rows of A against one packed panel, whose product `out` becomes, or is added to it.
void rows_by_panel(
    const uint16_t* a, int64_t stride, int64_t rows, int64_t k, const uint16_t* panel, float* out,
    int64_t out_stride, int64_t cols, bool add) {
  with_kind_of({out, out_stride, false, add ? out : nullptr, out_stride}, [&](const auto& to) {
    for (int64_t i = 0; i < rows; i += MR) {
      const int count = int(std::min<int64_t>(MR, rows - i));
      tiles(count, (k + 1) / 2, a + i * stride, stride, 2, panel, to.at(i, 0), cols);
    }
  });
}

void gemm_nt(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool& pool) {
  const int64_t k = a.cols, n = b.rows;
  const Pairs rows(a, 0, k);
  run(pool, (n + NR - 1) / NR, [&](int64_t begin, int64_t end) {
    Buffer<uint16_t> panel = buffer(round_up(std::min(k, KC), 2) * NR);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t column = block * NR, cols = std::min<int64_t>(NR, n - column);
      for (int64_t first = 0; first < k; first += KC) {
        const int64_t depth = std::min(KC, k - first);
        pack_columns(b.data + column * b.stride + first, b.stride, depth, cols, panel.get());
        rows_by_panel(rows.data + first, rows.stride, a.rows, depth, panel.get(), out + column, out_stride,
                      cols, first > 0);
      }
    }
  });
}

void gemm_nn(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool& pool) {
  const int64_t k = a.cols, n = b.cols;
  run(pool, (n + NR - 1) / NR, [&](int64_t begin, int64_t end) {
    Buffer<uint16_t> panel = buffer(round_up(std::min(k, KC), 2) * NR);
    for (int64_t first = 0; first < k; first += KC) {
      const int64_t depth = std::min(KC, k - first);
      const Pairs rows(a, first, depth);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t column = block * NR, cols = std::min<int64_t>(NR, n - column);
        pack_rows(b.data + first * b.stride + column, b.stride, depth, cols, panel.get());
        rows_by_panel(rows.data, rows.stride, a.rows, depth, panel.get(), out + column, out_stride, cols,
                      first > 0);
      }
    }
  });
}

template <class To>
void transposed(const Matrix& a, const Matrix& b, const To& to, const Pool& pool) {
  const int64_t k = a.rows, m = a.cols, n = b.cols, panels = (n + NR - 1) / NR;
  const int64_t depth = round_up(k, 2), block_rows = 16 * MR;
  Buffer<uint16_t> packed = buffer(panels * depth * NR);
  run(pool, panels, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t cols = std::min<int64_t>(NR, n - j * NR);
      pack_rows(b.data + j * NR, b.stride, k, cols, packed.get() + j * depth * NR);
    }
  });
  run(pool, (m + block_rows - 1) / block_rows, [&](int64_t begin, int64_t end) {
    Buffer<uint16_t> pairs = buffer(block_rows * depth);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_rows, rows = std::min(block_rows, m - first);
      pack_transposed(a.data + first, a.stride, k, rows, pairs.get());
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t cols = std::min<int64_t>(NR, n - j * NR);
        for (int64_t i = 0; i < rows; i += MR) {
          const int count = int(std::min<int64_t>(MR, rows - i));
          tiles(count, depth / 2, pairs.get() + 2 * i, 2, 2 * rows, packed.get() + j * depth * NR,
                to.at(first + i, j * NR), cols);
        }
      }
    }
  });
}

void gemm_tn(const Matrix& a, const Matrix& b, const Output& out, const Pool& pool) {
  with_kind_of(out, [&](const auto& to) { transposed(a, b, to, pool); });
}

bool available() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

const Products products_avx512_bf16 = {"AVX512-BF16", available, false, gemm_nt, gemm_nn, gemm_tn};

}  // namespace tropd
TROPD_TARGET_END
#endif
