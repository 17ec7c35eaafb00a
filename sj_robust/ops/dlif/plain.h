// DLIF on x itself, for one instruction set.
#include "blocks.h"

namespace sjr {
namespace SJR_SET {
namespace {

template <class C> struct Plain {
  static constexpr bool WRITES = true, SUMS = true;
  void enter(const Block<BLOCK<C>>&) {}
  void leave(const Block<BLOCK<C>>&) {}
  SJR_TARGET_INLINE Vec<C> input(Vec<C> x, int) const { return x; }
  template <bool STREAM> SJR_TARGET_INLINE void emit(C* gx, Vec<C> g, Vec<C>, int) { put<STREAM>(gx, g); }
};

int64_t scratch_bytes(const Job& job) { return blocks_bytes(job); }

template <class S, class C> void plain_forward(const Job& job, int64_t first, int64_t last, void* memory) {
  Plain<C> plain;
  forward_range<S, C>(job, first, last, memory, plain);
}

template <class S, class C> void plain_backward(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums) {
  Plain<C> plain;
  backward_range<S, C>(job, first, last, memory, gain_sums, plain);
}

void forward(const Job& job, int64_t first, int64_t last, void* memory) {
  switch (job.storage) {
    case FLOAT32: return plain_forward<float, float>(job, first, last, memory);
    case FLOAT64: return plain_forward<double, double>(job, first, last, memory);
    case FLOAT16: return plain_forward<Half, float>(job, first, last, memory);
    default: return plain_forward<BFloat16, float>(job, first, last, memory);
  }
}

void backward(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, double*) {
  switch (job.storage) {
    case FLOAT32: return plain_backward<float, float>(job, first, last, memory, gain_sums);
    case FLOAT64: return plain_backward<double, double>(job, first, last, memory, gain_sums);
    case FLOAT16: return plain_backward<Half, float>(job, first, last, memory, gain_sums);
    default: return plain_backward<BFloat16, float>(job, first, last, memory, gain_sums);
  }
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
