// bfloat16 products on AMX's tile units (Intel from Sapphire Rapids on), under Linux, which has to be
// asked for them.
//
// One micro-kernel: a block of 32 x 32 sums in four tiles, to which tdpbf16ps adds the products of
// 32 steps of k at once. Both operands are packed, tile by tile: A as 16 rows of 32 steps, B as 16
// pairs of steps of 16 columns. At most DEPTH steps of k are multiplied between two visits to the
// sums, so that 32 rows of one operand stay in the L1 cache while the other comes from L2.
//
//   gemm_nt   logits = hidden @ weight.T, as (weight @ hidden.T).T: the head's rows are A as they
//             lie, and the sums are transposed on their way out
//   gemm_nn   d_hidden = d_logits @ weight: k, the vocabulary, goes by; what all threads multiply
//             next they pack together
//   gemm_tn   d_weight += d_logits.T @ hidden: 512 ids' d_logits stay in L2, hidden goes by
//
// A core either multiplies or waits for memory: prefetching during the multiplication gained nothing
// (tiles from L2 and lines from memory likely want the same fill buffers). So rows are
// read in the order in which they lie, and results that are not read soon are streamed past the cache.
//
// tdpbf16ps treats subnormals as zero and adds in float32. Every sum of a result has one order,
// whatever the number of threads.

#include "gemm.h"

#if defined(TROPD_AMX)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "pages.h"
#include "target.h"
TROPD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "gemm_pack.h"
#include "tiles.h"

namespace tropd {
namespace {

constexpr int64_t STEP = 32;   // steps of k in a tile
constexpr int64_t TILE = 512;  // elements of a packed tile, 1 KiB
constexpr int64_t EDGE = 32;   // a block of sums is EDGE x EDGE
constexpr int64_t BLOCK = EDGE * EDGE;
constexpr int64_t DEPTH = 16;  // tiles of k: 32 KiB of 32 rows

// Which operand goes by; the other one stays in the L1 cache, out of which this keeps the first.
enum class Passing { a, b };

// sums (four tiles) = [sums +] a @ b over `steps` tiles of k. The second 16 rows of a and columns
// of b lie one panel further. The sums after these are likely the next.
template <Passing PASSING>
inline void block(
    const uint16_t* a, int64_t a_panel, const uint16_t* b, int64_t b_panel, int64_t steps, float* sums,
    bool first) {
  if (first) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  } else {
    tile_load<0>(sums);
    tile_load<1>(sums + 256);
    tile_load<2>(sums + 512);
    tile_load<3>(sums + 768);
  }
  for (int64_t s = 0; s < steps; ++s, a += TILE, b += TILE) {
    if constexpr (PASSING == Passing::a) {
      tile_load<6>(b);
      tile_load_passing<4>(a);
      tile_multiply<0, 4, 6>();
      tile_load<7>(b + b_panel);
      tile_multiply<1, 4, 7>();
      tile_load_passing<5>(a + a_panel);
    } else {
      tile_load<4>(a);
      tile_load_passing<6>(b);
      tile_multiply<0, 4, 6>();
      tile_load<5>(a + a_panel);
      tile_multiply<2, 5, 6>();
      tile_load_passing<7>(b + b_panel);
    }
    if constexpr (PASSING == Passing::a) {
      tile_multiply<2, 5, 6>();
    } else {
      tile_multiply<1, 4, 7>();
    }
    tile_multiply<3, 5, 7>();
    for (int i = 0; i < 4; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(sums + BLOCK + s % 16 * 64 + 16 * i), _MM_HINT_T0);
    }
  }
  tile_store<0>(sums);
  tile_store<1>(sums + 256);
  tile_store<2>(sums + 512);
  tile_store<3>(sums + 768);
}

// --- packing: panels of 16, each `steps` tiles; what lies outside is 0 ------------------------------

inline __mmask16 first_of_16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }
inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// A from rows (rows, k).
void pack_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t k, int64_t steps, uint16_t* to) {
  for (int64_t low = 0; low < round_up(rows, EDGE); low += 16, to += steps * TILE) {
    for (int64_t i = 0; i < 16; ++i) {
      const uint16_t* row = from + (low + i) * stride;
      for (int64_t s = 0; s < steps; ++s) {
        const __mmask32 mask = low + i < rows ? first_of_32(k - s * STEP) : 0;
        _mm512_store_si512(to + s * TILE + i * STEP, _mm512_maskz_loadu_epi16(mask, row + s * STEP));
      }
    }
  }
}

// A from columns (k, rows): 16 pairs of steps, transposed.
void pack_rows_transposed(
    const uint16_t* from, int64_t stride, int64_t rows, int64_t k, int64_t steps, uint16_t* to) {
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t low = 0; low < round_up(rows, EDGE); low += 16) {
      const __mmask16 mask = first_of_16(rows - low);
      __m512i r[16];
      for (int64_t p = 0; p < 16; ++p) {
        const int64_t step = s * STEP + 2 * p;
        const uint16_t* pair = from + step * stride + low;
        r[p] = two_steps(pair, stride, step < k ? mask : 0, step + 1 < k);
      }
      transpose(r);
      uint16_t* tile = to + (low / 16 * steps + s) * TILE;
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + i * STEP, r[i]);
    }
  }
}

// B from rows that are steps of k: (k, columns).
void pack_columns(
    const uint16_t* from, int64_t stride, int64_t columns, int64_t k, int64_t steps, uint16_t* to) {
  const __m512i left = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
      34, 2, 33, 1, 32, 0);
  const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t p = 0; p < 16; ++p) {
      const int64_t step = s * STEP + 2 * p;
      const uint16_t* pair = from + step * stride;
      for (int64_t low = 0; low < columns; low += EDGE) {
        const __mmask32 mask = first_of_32(columns - low);
        const __m512i even = _mm512_maskz_loadu_epi16(step < k ? mask : 0, pair + low);
        const __m512i odd = _mm512_maskz_loadu_epi16(step + 1 < k ? mask : 0, pair + stride + low);
        uint16_t* tile = to + (low / 16 * steps + s) * TILE + p * STEP;
        _mm512_store_si512(tile, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_store_si512(tile + steps * TILE, _mm512_permutex2var_epi16(even, right, odd));
      }
    }
  }
}

// B from rows that are columns of the product: 16 of them, (columns, k), transposed in pairs.
void pack_columns_transposed(
    const uint16_t* from, int64_t stride, int64_t columns, int64_t k, int64_t steps, uint16_t* to) {
  for (int64_t s = 0; s < steps; ++s, to += TILE) {
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i) {
      const __mmask32 mask = i < columns ? first_of_32(k - s * STEP) : 0;
      r[i] = _mm512_maskz_loadu_epi16(mask, from + i * stride + s * STEP);
    }
    transpose(r);
    for (int64_t p = 0; p < 16; ++p) _mm512_store_si512(to + p * STEP, r[p]);
  }
}

// --- from sums to results --------------------------------------------------------------------------

// A block's rows, and what they are added to; nothing outside rows x columns is touched.
template <class To>
inline void store_block(const float* block, int64_t rows, int64_t columns, const To& to) {
  for (int64_t i = 0; i < std::min(rows, EDGE); ++i) {
    const To here = to.at(i, 0);
    const float* left = block + i / 16 * 512 + i % 16 * 16;
    const __mmask16 masks[] = {first_of_16(columns), first_of_16(columns - 16)};
    const __m512 low = plus_sums(here, _mm512_load_ps(left), masks[0]);
    const __m512 high = plus_sums(to.at(i, 16), _mm512_load_ps(left + 256), masks[1]);
    if constexpr (To::rounds) {
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(low)), to_bf16(high), 1);
      const bool line = columns >= EDGE && reinterpret_cast<uintptr_t>(here.out) % 64 == 0;
      if (line) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(here.out), both);
      } else {
        _mm512_mask_storeu_epi16(here.out, first_of_32(columns), both);
      }
    } else {
      _mm512_mask_storeu_ps(here.out, masks[0], low);
      _mm512_mask_storeu_ps(here.out + 16, masks[1], high);
    }
  }
}

// A 16 x 16 tile, transposed, to out.
inline void store_transposed(const float* tile, int64_t rows, int64_t columns, float* out, int64_t stride) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile + 16 * i);
  transpose(r);
  const __mmask16 mask = first_of_16(columns);
  const bool lines = columns >= 16 && reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride % 16 == 0;
  for (int64_t i = 0; i < std::min<int64_t>(rows, 16); ++i) {
    float* to = out + i * stride;
    if (lines) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), r[i]);
    } else {
      _mm512_mask_storeu_ps(to, mask, _mm512_castsi512_ps(r[i]));
    }
  }
}

// --- the products ------------------------------------------------------------------------------------

void gemm_nt(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool& pool) {
  constexpr int64_t TOKENS = 256;  // hidden states that stay in L2 while the head goes by
  const int64_t n = b.rows, k = a.cols, steps = round_up(k, STEP) / STEP;
  Buffer<uint16_t> hidden = buffer(round_up(std::min(a.rows, TOKENS), EDGE) * steps * STEP);
  for (int64_t token = 0; token < a.rows; token += TOKENS) {
    const int64_t m = std::min(TOKENS, a.rows - token), token_blocks = round_up(m, EDGE) / EDGE;
    run(pool, 2 * token_blocks, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        pack_columns_transposed(
            a.data + (token + 16 * p) * a.stride, a.stride, m - 16 * p, k, steps,
            hidden.get() + p * steps * TILE);
      }
    });
    run(pool, (n + EDGE - 1) / EDGE, [&](int64_t begin, int64_t end) {
      Tiles tiles;
      Buffer<uint16_t> head = buffer(EDGE * steps * STEP);
      Buffer<float> sums = buffer<float>(token_blocks * BLOCK + BLOCK);
      for (int64_t id = begin * EDGE; id < std::min(end * EDGE, n); id += EDGE) {
        const int64_t ids = std::min(EDGE, n - id);
        pack_rows(b.data + id * b.stride, b.stride, ids, k, steps, head.get());
        for (int64_t s = 0; s < steps; s += DEPTH) {
          for (int64_t t = 0; t < token_blocks; ++t) {
            block<Passing::b>(
                head.get() + s * TILE, steps * TILE, hidden.get() + (2 * t * steps + s) * TILE,
                steps * TILE, std::min(DEPTH, steps - s), sums.get() + t * BLOCK, s == 0);
          }
        }
        for (int64_t t = 0; t < m; t += 16) {
          for (int64_t i = 0; i < ids; i += 16) {
            const float* tile = sums.get() + t / EDGE * BLOCK + (i / 16 * 2 + t / 16 % 2) * 256;
            store_transposed(tile, m - t, ids - i, out + (token + t) * out_stride + id + i, out_stride);
          }
        }
      }
      _mm_sfence();
    });
  }
}

void gemm_nn(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, const Pool& pool) {
  constexpr int64_t SIDE = 1024;  // of the largest part of the sums that one thread works on
  const int64_t m = a.rows, n = b.cols, k = a.cols, steps = round_up(k, STEP) / STEP;
  if (m == 0 || n == 0) return;
  const int64_t rows = round_up(m, EDGE) / EDGE, columns = round_up(n, EDGE) / EDGE;  // of blocks
  // Parts for every thread; their sizes change no sum.
  int64_t down = (m + SIDE - 1) / SIDE, across = (n + SIDE - 1) / SIDE;
  while (down * across % pool.threads != 0 && down * across < 4 * pool.threads) {
    if (m / down > n / across ? down == rows : across == columns) break;
    m / down > n / across ? ++down : ++across;
  }
  const int64_t height = (rows + down - 1) / down, width = (columns + across - 1) / across;
  Buffer<uint16_t> left = buffer(rows * EDGE * DEPTH * STEP), right = buffer(columns * EDGE * DEPTH * STEP);
  Buffer<float> sums = buffer<float>((rows * columns + 1) * BLOCK);
  const To<false, false> to = {out, out_stride};
  for (int64_t s = 0; s < steps; s += DEPTH) {
    const int64_t depth = std::min(DEPTH, steps - s), low = s * STEP, block_size = 2 * depth * TILE;
    run(pool, pool.threads, [&](int64_t begin, int64_t end) {  // a share of both operands each
      const int64_t row = begin * rows / pool.threads * EDGE, last = end * rows / pool.threads * EDGE;
      if (row < last) {
        pack_rows(a.data + row * a.stride + low, a.stride, std::min(last, m) - row, k - low, depth,
                  left.get() + row / EDGE * block_size);
      }
      const int64_t column = begin * columns / pool.threads * EDGE;
      const int64_t last_column = end * columns / pool.threads * EDGE;
      if (column < last_column) {
        pack_columns(b.data + low * b.stride + column, b.stride, std::min(last_column, n) - column, k - low,
                     depth, right.get() + column / EDGE * block_size);
      }
    });
    run(pool, down * across, [&](int64_t begin, int64_t end) {
      Tiles tiles;
      for (int64_t part = begin; part < end; ++part) {
        const int64_t row = part / across * height, column = part % across * width;
        for (int64_t j = column; j < std::min(column + width, columns); ++j) {
          for (int64_t i = row; i < std::min(row + height, rows); ++i) {
            block<Passing::a>(
                left.get() + i * block_size, depth * TILE, right.get() + j * block_size, depth * TILE, depth,
                sums.get() + (j * rows + i) * BLOCK, s == 0);
          }
        }
      }
    });
  }
  run(pool, rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        store_block(sums.get() + (j * rows + i) * BLOCK, m - i * EDGE, n - j * EDGE,
                    to.at(i * EDGE, j * EDGE));
      }
    }
  });
}

template <class To>
void transposed(const Matrix& a, const Matrix& b, const To& to, const Pool& pool) {
  const int64_t k = a.rows, m = a.cols, n = b.cols, steps = round_up(k, STEP) / STEP;
  const int64_t panels = round_up(n, EDGE) / 16;
  // So many ids that their d_logits take up to 1 MiB, but a block of them at least.
  const int64_t ids_at_once = std::min<int64_t>(512, std::max<int64_t>(1, (1 << 14) / (steps * EDGE)) * EDGE);
  Buffer<uint16_t> hidden = buffer(panels * steps * TILE);
  run(pool, panels / 2, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_columns(b.data + p * EDGE, b.stride, std::min(EDGE, n - p * EDGE), k, steps,
                   hidden.get() + 2 * p * steps * TILE);
    }
  });
  run(pool, (m + ids_at_once - 1) / ids_at_once, [&](int64_t begin, int64_t end) {
    Tiles tiles;
    Buffer<uint16_t> left = buffer(ids_at_once * steps * STEP);
    Buffer<float> sums = buffer<float>(ids_at_once * EDGE + BLOCK);
    for (int64_t id = begin * ids_at_once; id < std::min(end * ids_at_once, m); id += ids_at_once) {
      const int64_t ids = std::min(ids_at_once, m - id), blocks = round_up(ids, EDGE) / EDGE;
      make_pages(to.at(id, 0).out, ((ids - 1) * to.stride + n) * sizeof(*to.out));
      pack_rows_transposed(a.data + id, a.stride, ids, k, steps, left.get());
      for (int64_t j = 0; j < panels / 2; ++j) {
        for (int64_t s = 0; s < steps; s += DEPTH) {
          const int64_t depth = std::min(DEPTH, steps - s);
          const uint16_t* columns = hidden.get() + 2 * j * steps * TILE + s * TILE;
          for (int64_t i = 0; i < blocks; ++i) {
            block<Passing::a>(left.get() + (2 * i * steps + s) * TILE, steps * TILE, columns, steps * TILE,
                              depth, sums.get() + i * BLOCK, s == 0);
          }
        }
        for (int64_t i = 0; i < blocks; ++i) {
          store_block(sums.get() + i * BLOCK, ids - i * EDGE, n - j * EDGE, to.at(id + i * EDGE, j * EDGE));
        }
      }
    }
    _mm_sfence();
  });
}

void gemm_tn(const Matrix& a, const Matrix& b, const Output& out, const Pool& pool) {
  with_kind_of(out, [&](const auto& to) { transposed(a, b, to, pool); });
}

bool available() {
  static const bool granted = products_avx512_bf16.available() && tiles_granted();
  return granted;
}

}  // namespace

const Products products_amx = {TILES_NAME, available, false, gemm_nt, gemm_nn, gemm_tn};

}  // namespace tropd
TROPD_TARGET_END
#endif
