// Products on AVX2 with FMA, for CPUs that multiply no bfloat16 (AMD's before Zen 4, most laptops): of
// bfloat16 or float32 operands, which are packed as float32.
//
// One micro-kernel: a tile of MR x NR sums in 12 registers. A is packed in panels of MR rows, B in panels
// of NR columns, each step of k side by side, DEPTH steps at a time: so a panel of B stays in the L1
// cache, and BLOCK rows of A in L2, out of which they go by. Sums of a longer k wait as they lie in the
// tile; the last steps store them where they belong.
//
//   gemm_nt   logits = hidden @ weight.T: hidden is packed once for all threads; COLUMNS of the head's
//             rows at a time are packed by the thread that multiplies them
//   gemm_nn   d_hidden = d_logits @ weight: k, the vocabulary, goes by; what all threads multiply next
//             they pack together
//   gemm_tn   d_weight += d_logits.T @ hidden: hidden is packed once for all threads, BLOCK ids'
//             d_logits by the thread that multiplies them
//
// Every sum of a result has one order, whatever the number of threads: DEPTH products one after the
// other, and these sums one after the other.

#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#define TROPD_ISA avx2
#define TROPD_BYTES 32
#include "target.h"
TROPD_TARGET_BEGIN("avx2,fma")
#include "gemm_common.h"
#include "vectors.h"

namespace tropd {
namespace {

using namespace avx2;  // its vectors

using V = Vector<float>;
constexpr int LANES = 8, MR = 6, NR = 16;
constexpr int64_t DEPTH = 256;
constexpr int64_t BLOCK = 96;     // rows of A: 96 KiB
constexpr int64_t COLUMNS = 128;  // of B: 128 KiB

inline V multiply_add(V a, V b, V c) {
  return _mm256_fmadd_ps(a, b, c);
}

inline V broadcast(const float* from) {  // in one instruction
  return _mm256_broadcast_ss(from);
}

inline void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

// LANES rows of LANES floats, transposed.
TROPD_INLINE void transpose(V r[LANES]) {
  V t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// --- the micro-kernel ------------------------------------------------------------------------------

// Where the sums of a tile's DEPTH steps go: they start with the first ones, and are stored with the last.
struct Steps {
  int64_t depth;
  bool first, last;
};

// Some columns of a row's sums, which fill no vector.
template <class To>
inline void store_some(const float* sums, int64_t columns, const To& to) {
  for (int64_t j = 0; j < columns; ++j) {
    const float sum = To::adds ? to.sums[j] + sums[j] : sums[j];
    if constexpr (To::rounds) {
      uint16_t rounded[LANES];
      store<float>(reinterpret_cast<bf16*>(rounded), all<float>(sum));
      to.out[j] = rounded[0];
    } else {
      to.out[j] = sum;
    }
  }
}

template <class To>
TROPD_INLINE void store_vector(V sums, const To& to) {
  if constexpr (To::adds) sums = load<float>(to.sums) + sums;
  if constexpr (To::rounds) {
    store<float>(reinterpret_cast<bf16*>(to.out), sums);
  } else {
    store<float>(to.out, sums);
  }
}

// A tile of ROWS rows: `kept` are its sums so far, (MR, NR).
template <int ROWS, class To>
void tile(const Steps& steps, const float* a, const float* b, float* kept, const To& to, int64_t columns) {
  V sum[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = V{};
  // What is read or written at the end lies in one line of each of many pages: no prefetcher foresees it.
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    if (!steps.first) prefetch(kept + i * NR);
    if (!steps.last) continue;
    const To here = to.at(i, 0);
    prefetch(here.out);
    if constexpr (To::adds && To::rounds) prefetch(here.sums);
  }
#pragma GCC unroll 4
  for (int64_t p = 0; p < steps.depth; ++p, a += MR, b += NR) {
    const V left = load<float>(b), right = load<float>(b + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const V value = broadcast(a + i);
      sum[i][0] = multiply_add(value, left, sum[i][0]);
      sum[i][1] = multiply_add(value, right, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    float* row = kept + i * NR;
    if (!steps.first) {
      sum[i][0] = load<float>(row) + sum[i][0];
      sum[i][1] = load<float>(row + LANES) + sum[i][1];
    }
    const To here = to.at(i, 0);
    if (steps.last && columns >= NR) {
      store_vector(sum[i][0], here);
      store_vector(sum[i][1], here.at(0, LANES));
    } else {
      store<float>(row, sum[i][0]);
      store<float>(row + LANES, sum[i][1]);
      if (steps.last) store_some(row, columns, here);
    }
  }
}

template <class To>
void tiles(
    int64_t rows, const Steps& steps, const float* a, const float* b, float* kept, const To& to,
    int64_t columns) {
  switch (rows) {
    case 1: return tile<1>(steps, a, b, kept, to, columns);
    case 2: return tile<2>(steps, a, b, kept, to, columns);
    case 3: return tile<3>(steps, a, b, kept, to, columns);
    case 4: return tile<4>(steps, a, b, kept, to, columns);
    case 5: return tile<5>(steps, a, b, kept, to, columns);
    default: return tile<MR>(steps, a, b, kept, to, columns);
  }
}

// rows x columns of the result from packed panels, each `steps.depth` deep; a tile's sums are
// kept[column's panel][row's panel], `kept_rows` panels of rows to one of columns.
template <class To>
void multiply(
    int64_t rows, int64_t columns, const Steps& steps, const float* a, const float* b, float* kept,
    int64_t kept_rows, const To& to) {
  for (int64_t j = 0; j < columns; j += NR) {
    for (int64_t i = 0; i < rows; i += MR) {
      float* sums = kept + (j / NR * kept_rows + i / MR) * MR * NR;
      tiles(std::min<int64_t>(MR, rows - i), steps, a + i * steps.depth, b + j * steps.depth, sums, to.at(i, j),
            columns - j);
    }
  }
}

// --- packing: panels of WIDTH rows of A or columns of B, each to[step][WIDTH] ------------------------

template <class T>
TROPD_INLINE V load_some(const T* from, int64_t count) {  // the others are 0
  if (count >= LANES) return load<float>(from);
  T values[LANES] = {};
  if (count > 0) __builtin_memcpy(values, from, count * sizeof(T));
  return load<float>(values);
}

// A step of a panel, where nothing may be written behind its last.
template <int WIDTH>
TROPD_INLINE void store_step(float* to, V values, bool last) {
  if (WIDTH % LANES == 0 || !last) return store<float>(to, values);  // what is too much is overwritten
  __builtin_memcpy(to, &values, WIDTH % LANES * sizeof(float));
}

// One panel from rows of the operand: from[i][step], of which there are `count`.
template <int WIDTH, class T>
void pack_panel_transposed(const T* from, int64_t stride, int64_t count, int64_t depth, float* to) {
  for (int c = 0; c < WIDTH; c += LANES) {
    for (int64_t p = 0; p < depth; p += LANES) {
      V r[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        const bool there = i < WIDTH && c + i < count;
        r[i] = there ? load_some(from + (c + i) * stride + p, depth - p) : V{};
      }
      transpose(r);
      for (int64_t s = 0; s < std::min<int64_t>(LANES, depth - p); ++s) {
        store_step<WIDTH>(to + (p + s) * WIDTH + c, r[s], p + s + 1 == depth);
      }
    }
  }
}

template <int WIDTH, class T>
void pack_transposed(const T* from, int64_t stride, int64_t count, int64_t depth, float* to) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    pack_panel_transposed<WIDTH>(from + i * stride, stride, count - i, depth, to + i * depth);
  }
}

// Panels from columns of the operand: from[step][i].
template <int WIDTH, class T>
void pack_straight(const T* from, int64_t stride, int64_t count, int64_t depth, float* to) {
  for (int64_t p = 0; p < depth; ++p, from += stride, to += WIDTH) {
    for (int64_t i = 0; i < count; i += WIDTH) {
      for (int c = 0; c < WIDTH; c += LANES) {
        store_step<WIDTH>(to + i * depth + c, load_some(from + i + c, count - i - c), p + 1 == depth);
      }
    }
  }
}

// Rows [row, row + rows) of a matrix that are rows of A or columns of B, from step `first` on.
template <int WIDTH>
void pack_rows(const Matrix& m, int64_t row, int64_t rows, int64_t first, int64_t depth, float* to) {
  const int64_t at = row * m.stride + first;
  if (m.float32 != nullptr) return pack_transposed<WIDTH>(m.float32 + at, m.stride, rows, depth, to);
  pack_transposed<WIDTH>(reinterpret_cast<const bf16*>(m.data) + at, m.stride, rows, depth, to);
}
// The same where they are its columns.
template <int WIDTH>
void pack_columns(const Matrix& m, int64_t column, int64_t columns, int64_t first, int64_t depth, float* to) {
  const int64_t at = first * m.stride + column;
  if (m.float32 != nullptr) return pack_straight<WIDTH>(m.float32 + at, m.stride, columns, depth, to);
  pack_straight<WIDTH>(reinterpret_cast<const bf16*>(m.data) + at, m.stride, columns, depth, to);
}

inline int64_t panels(int64_t n, int64_t width) { return (n + width - 1) / width; }

inline Steps steps_from(int64_t first, int64_t k) {
  const int64_t depth = std::min(DEPTH, k - first);
  return {depth, first == 0, first + depth == k};
}

// Each thread's share of `n` panels, from which it is called for the operand's [begin, end).
template <class F>
void share(int64_t part, int64_t parts, int64_t count, int64_t width, const F& f) {
  const int64_t n = panels(count, width);
  const int64_t begin = part * n / parts * width, end = std::min((part + 1) * n / parts * width, count);
  if (begin < end) f(begin, end);
}

// --- the products ------------------------------------------------------------------------------------

void gemm_nt(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool& pool) {
  constexpr int64_t TOKENS = 85 * MR;  // packed at once
  const int64_t n = b.rows, k = a.cols, most = round_up(std::min(a.rows, TOKENS), MR);
  Buffer<float> hidden = buffer<float>(most * k);
  for (int64_t token = 0; token < a.rows; token += TOKENS) {
    const int64_t m = std::min(TOKENS, a.rows - token), height = round_up(m, MR);
    const To<false, false> to = {out + token * out_stride, out_stride};
    run(pool, panels(m, MR), [&](int64_t begin, int64_t end) {
      for (int64_t first = 0; first < k; first += DEPTH) {
        const int64_t row = begin * MR, depth = std::min(DEPTH, k - first);
        pack_rows<MR>(a, token + row, std::min(end * MR, m) - row, first, depth,
                      hidden.get() + first * height + row * depth);
      }
    });
    run(pool, panels(n, COLUMNS), [&](int64_t begin, int64_t end) {
      Buffer<float> head = buffer<float>(COLUMNS * std::min(k, DEPTH));
      Buffer<float> sums = buffer<float>(height * COLUMNS);
      for (int64_t id = begin * COLUMNS; id < std::min(end * COLUMNS, n); id += COLUMNS) {
        const int64_t ids = std::min(COLUMNS, n - id);
        for (int64_t first = 0; first < k; first += DEPTH) {
          const Steps steps = steps_from(first, k);
          pack_rows<NR>(b, id, ids, first, steps.depth, head.get());
          for (int64_t row = 0; row < m; row += BLOCK) {
            multiply(std::min(BLOCK, m - row), ids, steps, hidden.get() + first * height + row * steps.depth,
                     head.get(), sums.get() + row * NR, height / MR, to.at(row, id));
          }
        }
      }
    });
  }
}

void gemm_nn(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool& pool) {
  constexpr int64_t WIDE = 4 * NR;  // columns of a part
  const int64_t m = a.rows, n = b.cols, k = a.cols, deepest = std::min(k, DEPTH);
  const int64_t height = round_up(m, MR), width = round_up(n, NR);
  const int64_t down = panels(m, BLOCK), across = panels(n, WIDE);
  Buffer<float> left = buffer<float>(height * deepest), right = buffer<float>(width * deepest);
  Buffer<float> sums = buffer<float>(height * width);
  const To<false, false> to = {out, out_stride};
  for (int64_t first = 0; first < k; first += DEPTH) {
    const Steps steps = steps_from(first, k);
    run(pool, pool.threads, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        share(part, pool.threads, m, MR, [&](int64_t low, int64_t high) {
          pack_rows<MR>(a, low, high - low, first, steps.depth, left.get() + low * steps.depth);
        });
        share(part, pool.threads, n, NR, [&](int64_t low, int64_t high) {
          pack_columns<NR>(b, low, high - low, first, steps.depth, right.get() + low * steps.depth);
        });
      }
    });
    run(pool, down * across, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t row = part % down * BLOCK, column = part / down * WIDE;
        multiply(std::min(BLOCK, m - row), std::min(WIDE, n - column), steps, left.get() + row * steps.depth,
                 right.get() + column * steps.depth, sums.get() + column * height + row * NR, height / MR,
                 to.at(row, column));
      }
    });
  }
}

template <class To>
void transposed(const Matrix& a, const Matrix& b, const To& to, const Pool& pool) {
  const int64_t k = a.rows, m = a.cols, n = b.cols, width = round_up(n, NR);
  Buffer<float> hidden = buffer<float>(width * k);
  run(pool, panels(n, NR), [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < k; first += DEPTH) {
      const int64_t column = begin * NR, depth = std::min(DEPTH, k - first);
      pack_columns<NR>(b, column, std::min(end * NR, n) - column, first, depth,
                       hidden.get() + first * width + column * depth);
    }
  });
  run(pool, panels(m, BLOCK), [&](int64_t begin, int64_t end) {
    Buffer<float> left = buffer<float>(BLOCK * std::min(k, DEPTH));
    Buffer<float> sums = buffer<float>(BLOCK * width);
    for (int64_t id = begin * BLOCK; id < std::min(end * BLOCK, m); id += BLOCK) {
      const int64_t ids = std::min(BLOCK, m - id);
      for (int64_t first = 0; first < k; first += DEPTH) {
        const Steps steps = steps_from(first, k);
        pack_columns<MR>(a, id, ids, first, steps.depth, left.get());
        multiply(ids, n, steps, left.get(), hidden.get() + first * width, sums.get(), BLOCK / MR, to.at(id, 0));
      }
    }
  });
}

void gemm_tn(const Matrix& a, const Matrix& b, const Output& out, const Pool& pool) {
  with_kind_of(out, [&](const auto& to) { transposed(a, b, to, pool); });
}

bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Products products_avx2 = {"AVX2", available, true, gemm_nt, gemm_nn, gemm_tn};

}  // namespace tropd
TROPD_TARGET_END
#endif
