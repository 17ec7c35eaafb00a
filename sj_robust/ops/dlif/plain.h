// DLIF on x itself, for one instruction set.
#include "blocks.h"

namespace sjr {
namespace SJR_SET {
namespace {

template <class C>
struct Plain {
  static constexpr bool WRITES = true;
  static constexpr bool SUMS = true;
  void enter(const Block<BLOCK<C>>&) {}
  void leave(const Block<BLOCK<C>>&) {}
  SJR_TARGET_INLINE Vec<C> input(Vec<C> x, int) const { return x; }
  template <bool STREAM>
  SJR_TARGET_INLINE void emit(C* gx, Vec<C> g, Vec<C>, int) {
    put<STREAM>(gx, g);
  }
};

int64_t scratch_bytes(const Job& job) {
  return blocks_bytes(job);
}

template <class S, class C>
void plain_forward(const Job& job, int64_t first, int64_t last, void* memory) {
  Plain<C> plain;
  forward_range<S, C>(job, first, last, memory, plain);
}

template <class S, class C>
void plain_backward(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums) {
  Plain<C> plain;
  backward_range<S, C>(job, first, last, memory, gain_sums, plain);
}

void forward(const Job& job, int64_t first, int64_t last, void* memory) {
  with_types(job, [&](auto s, auto c) {
    plain_forward<decltype(s), decltype(c)>(job, first, last, memory);
  });
}

void backward(
    const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, double*) {
  with_types(job, [&](auto s, auto c) {
    plain_backward<decltype(s), decltype(c)>(job, first, last, memory, gain_sums);
  });
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
