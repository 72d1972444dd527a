// AMX's tiles: eight of 16 rows of 64 bytes, by their instructions or, where TROPD_EMULATE_AMX is
// defined, in memory, so that what packs and stores them can be tested on any CPU with AVX512-BF16.
// Included by gemm_amx.cpp after its target is set.

namespace tropd {
namespace {

#if defined(TROPD_EMULATE_AMX)

constexpr const char* TILES_NAME = "AMX emulated";

inline bool tiles_granted() { return true; }

struct Emulated {
  bool configured;
  alignas(64) uint32_t tile[8][16][16];

  __m512i* row(int t, int i) {
    if (!configured) std::abort();  // as a CPU would raise an error
    return reinterpret_cast<__m512i*>(tile[t][i]);
  }
};
inline thread_local Emulated emulated;

// This thread's tiles, for as long as it lives.
struct Tiles {
  Tiles() { emulated = {true, {}}; }
  ~Tiles() { emulated.configured = false; }
};

template <int T>
inline void tile_load(const void* from) {
  for (int i = 0; i < 16; ++i) {
    *emulated.row(T, i) = _mm512_loadu_si512(static_cast<const uint8_t*>(from) + 64 * i);
  }
}

template <int T>
inline void tile_load_passing(const void* from) {
  tile_load<T>(from);
}

template <int T>
inline void tile_store(void* to) {
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(static_cast<uint8_t*>(to) + 64 * i, *emulated.row(T, i));
  }
}

template <int T>
inline void tile_zero() {
  for (int i = 0; i < 16; ++i) *emulated.row(T, i) = _mm512_setzero_si512();
}

template <int SUM, int A, int B>
inline void tile_multiply() {
  for (int i = 0; i < 16; ++i) {
    __m512 sum = _mm512_castsi512_ps(*emulated.row(SUM, i));
    for (int p = 0; p < 16; ++p) {
      const __m512i pair = _mm512_set1_epi32(int(emulated.tile[A][i][p]));
      sum = _mm512_dpbf16_ps(
          sum, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(*emulated.row(B, p)));
    }
    *emulated.row(SUM, i) = _mm512_castps_si512(sum);
  }
}

#else

constexpr const char* TILES_NAME = "AMX";

// The CPU has the units, and the system grants their registers to this process.
inline bool tiles_granted() {
  uint32_t a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  return bf16 && tiles && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Assembly, for what compilers' intrinsics leave out: that tiles read memory, and all of the
// configuration.

// This thread's tiles, for as long as it lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::); }
};

template <int T>
inline void tile_load(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(64)), "i"(T) : "memory");
}

// What comes but once, past the L1 cache.
template <int T>
inline void tile_load_passing(const void* from) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(64)), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t(64)), "i"(T) : "memory");
}

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// SUM (16, 16) float32 += A (16, 32) @ B (32, 16), as 16 pairs of steps of 16 columns.
template <int SUM, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace tropd
