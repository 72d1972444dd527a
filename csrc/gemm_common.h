// What the products share whatever their instructions: buffers, threads, and where results go. Included
// by gemm_*.cpp after their target is set.

namespace tropd {
namespace {

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T, Free>;
template <class T = uint16_t>
Buffer<T> buffer(int64_t elements) {
  return Buffer<T>(static_cast<T*>(::operator new(elements * sizeof(T), std::align_val_t(64))));
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class F>
void run(const Pool& pool, int64_t n, const F& f) {
  pool.split(
      n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// An `Output` of a kind that the compiler knows, from some row and column on.
template <bool ROUNDS, bool ADDS>
struct To {
  static constexpr bool rounds = ROUNDS, adds = ADDS;
  std::conditional_t<ROUNDS, uint16_t, float>* out;
  int64_t stride;
  const float* sums = nullptr;
  int64_t sums_stride = 0;

  To at(int64_t row, int64_t column) const {
    const float* there = ADDS ? sums + row * sums_stride + column : nullptr;
    return {out + row * stride + column, stride, there, sums_stride};
  }
};

template <class F>
void with_kind_of(const Output& out, const F& f) {
  const auto call = [&](auto rounds, auto adds) {
    using Kind = To<rounds.value, adds.value>;
    f(Kind{static_cast<decltype(Kind::out)>(out.out), out.stride, out.sums, out.sums_stride});
  };
  const std::true_type yes;
  const std::false_type no;
  if (out.rounds) {
    out.sums ? call(yes, yes) : call(yes, no);
  } else {
    out.sums ? call(no, yes) : call(no, no);
  }
}

}  // namespace
}  // namespace tropd
