// DLIF on blocks of neurons, for one instruction set. A block walks through all T steps with its potentials in the
// first-level cache; the backward pass first computes h again into a scratch that stays there too.
// What happens to x before the neuron, and to its gradient behind it, is a Coupling: Plain in plain.h (nothing),
// Normalised in bn_dlif. Its functions:
//   enter(first, size), leave(first, size)   before and after a block
//   input(x, k)                              current of the neuron for the vector k elements into the block
//   emit<STREAM>(gx, g, x, k)                gradient g of that current turned into one of x
// and its constants: WRITES (emit writes gx), SUMS (the gradient of the gain is wanted).
#include "simd.h"

namespace sjr {
namespace SJR_SET {
namespace {

// What a spike does to the potential. TO_ZERO is TO_VALUE with v_reset = 0, nearly every network's, in fewer instructions.
enum Reset { TO_VALUE, TO_ZERO, SOFT };

// Neuron constants in the arithmetic type.
template <class C> struct Neuron {
  C decay, leak_current, v_threshold, v_reset, v_start, alpha, slope;
  explicit Neuron(const Job& job)
      : decay(C(job.decay)),
        leak_current(C(job.leak_current)),
        v_threshold(C(job.v_threshold)),
        v_reset(C(job.v_reset)),
        v_start(job.soft_reset ? C(0) : C(job.v_reset)),
        alpha(C(job.surrogate == ATAN ? job.alpha / 2 : job.alpha)),
        slope(C(job.surrogate == TRIANGLE ? job.alpha * job.alpha : job.surrogate == ATAN ? 1.57079632679489662 * job.alpha : job.alpha)) {}
};

template <int SURROGATE, class C> SJR_INLINE Vec<C> derivative(Vec<C> z, const Neuron<C>& n) {
  if constexpr (SURROGATE == TRIANGLE) {
    return positive_part<C>(n.alpha - n.slope * magnitude<C>(z));
  } else if constexpr (SURROGATE == ATAN) {
    const Vec<C> y = n.slope * z;
    return n.alpha / (C(1) + y * y);
  } else {
    const Vec<C> s = C(1) / (C(1) + exponential(-n.slope * z));
    return n.alpha * s * (C(1) - s);
  }
}

template <Reset RESET, class C> SJR_INLINE Vec<C> after_reset(Vec<C> h, const Neuron<C>& n) {
  return h >= n.v_threshold ? (RESET == SOFT ? h - n.v_threshold : RESET == TO_ZERO ? Vec<C>{} : fill(n.v_reset)) : h;
}

template <Reset RESET, class C> SJR_INLINE Vec<C> charge(Vec<C> v, Vec<C> x, C gain, const Neuron<C>& n) {
  const Vec<C> h = v * n.decay + x * gain;
  return RESET == TO_VALUE ? h + n.leak_current : h;
}

// Asks for what the next block will read in this row: T short rows defeat the processor's own prefetching, and
// arithmetic and memory would take turns. Beyond the tensor it has no effect.
template <class C> SJR_INLINE void fetch_ahead(const C* row, int k) {
  if (k * SJR_VECTOR_BYTES % 64 == 0) __builtin_prefetch(row + BLOCK<C> + k * LANES<C>);
}

// One block; consecutive steps of every sequence lie `stride` apart; v_init and v_seq may be null.
template <class C> struct ForwardBlock {
  const C *x, *gain, *v_init;
  C *s, *v, *v_seq;
  int64_t T, stride;
};

template <class C, class Coupling, Reset RESET, bool STREAM>
__attribute__((noinline)) void forward_block(const ForwardBlock<C>& b, const Neuron<C> n, Coupling& coupling) {
  constexpr int W = LANES<C>;
  Vec<C> v[ROWS];
  for (int k = 0; k < ROWS; ++k) v[k] = b.v_init ? load(b.v_init + k * W) : fill(n.v_start);
  const C *x = b.x;
  C *s = b.s, *v_seq = b.v_seq;
  for (int64_t t = 0; t < b.T; ++t, x += b.stride, s += b.stride) {
    const C gain = b.gain[t];
    SJR_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const Vec<C> h = charge<RESET>(v[k], coupling.input(load(x + k * W), k * W), gain, n);
      fetch_ahead<C>(x, k);
      put<STREAM>(s + k * W, h >= n.v_threshold ? fill(C(1)) : Vec<C>{});
      v[k] = after_reset<RESET>(h, n);
    }
    if (v_seq) {
      for (int k = 0; k < ROWS; ++k) put<STREAM>(v_seq + k * W, v[k]);
      v_seq += b.stride;
    }
  }
  for (int k = 0; k < ROWS; ++k) put<STREAM>(b.v + k * W, v[k]);
}

// One block; v_init, gv, gvs and gv_init may be null. h is a scratch [T, BLOCK]; gain_sums [T, LANES] is added to.
template <class C> struct BackwardBlock {
  const C *x, *gain, *v_init, *gs, *gv, *gvs;
  C *gx, *gv_init, *h, *gain_sums;
  int64_t T, stride;
};

template <class C, class Coupling, Reset RESET, int SURROGATE, bool DETACH, bool STREAM>
__attribute__((noinline)) void backward_block(const BackwardBlock<C>& b, const Neuron<C> n, Coupling& coupling) {
  constexpr int W = LANES<C>;
  Vec<C> v[ROWS];
  for (int k = 0; k < ROWS; ++k) v[k] = b.v_init ? load(b.v_init + k * W) : fill(n.v_start);
  for (int64_t t = 0; t < b.T; ++t) {
    const C gain = b.gain[t];
    const C* x = b.x + t * b.stride;
    C* h_row = b.h + t * BLOCK<C>;
    SJR_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const Vec<C> h = charge<RESET>(v[k], coupling.input(load(x + k * W), k * W), gain, n);
      fetch_ahead<C>(x, k);
      store(h_row + k * W, h);
      v[k] = after_reset<RESET>(h, n);
    }
  }
  for (int k = 0; k < ROWS; ++k) v[k] = b.gv ? load(b.gv + k * W) : Vec<C>{};  // from here on the gradient of v
  for (int64_t t = b.T - 1; t >= 0; --t) {
    const C gain = b.gain[t];
    const C *x = b.x + t * b.stride, *gs = b.gs + t * b.stride, *h_row = b.h + t * BLOCK<C>;
    C* gx = b.gx + t * b.stride;
    if (b.gvs)
      for (int k = 0; k < ROWS; ++k) v[k] += load(b.gvs + t * b.stride + k * W);
    [[maybe_unused]] Vec<C> sums = load(b.gain_sums + t * W);
    SJR_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const Vec<C> h = load(h_row + k * W), g = derivative<SURROGATE>(h - n.v_threshold, n);
      Vec<C> through_spike = load(gs + k * W);
      Vec<C> gh;
      if constexpr (RESET == SOFT) {
        if constexpr (!DETACH) through_spike -= v[k] * n.v_threshold;
        gh = through_spike * g + v[k];
      } else {
        if constexpr (!DETACH) through_spike = RESET == TO_ZERO ? through_spike - v[k] * h : through_spike + v[k] * (n.v_reset - h);
        gh = through_spike * g + (h >= n.v_threshold ? Vec<C>{} : v[k]);
      }
      fetch_ahead<C>(gs, k);
      const Vec<C> xk = load(x + k * W);
      coupling.template emit<STREAM>(gx + k * W, gh * gain, xk, k * W);
      if constexpr (Coupling::SUMS) sums += gh * coupling.input(xk, k * W);
      v[k] = gh * n.decay;
    }
    if constexpr (Coupling::SUMS) store(b.gain_sums + t * W, sums);
  }
  if (b.gv_init)
    for (int k = 0; k < ROWS; ++k) store(b.gv_init + k * W, v[k]);
}

// Rows between a tensor of storage type S and a scratch of arithmetic type C; lanes beyond the tensor are zero.
template <class S, class C> void read_rows(const S* from, int64_t stride, int64_t n, int64_t T, C* to) {
  for (int64_t t = 0; t < T; ++t, from += stride, to += BLOCK<C>) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen<C>(from[i]);
    for (int64_t i = n; i < BLOCK<C>; ++i) to[i] = C(0);
  }
}

template <class S, class C> void write_rows(const C* from, int64_t n, int64_t T, S* to, int64_t stride) {
  for (int64_t t = 0; t < T; ++t, from += BLOCK<C>, to += stride)
    for (int64_t i = 0; i < n; ++i) to[i] = Narrow<S, C>::from(from[i]);
}

template <class C, class K> using ForwardFn = void (*)(const ForwardBlock<C>&, const Neuron<C>, K&);
template <class C, class K> using BackwardFn = void (*)(const BackwardBlock<C>&, const Neuron<C>, K&);

// Only float is worth further copies of the code: large tensors with streaming stores, and a reset to zero.
template <class C> constexpr bool FAST_PATHS = std::is_same_v<C, float>;

template <class C, class K, Reset RESET> ForwardFn<C, K> choose_forward(bool stream) {
  return stream ? forward_block<C, K, RESET, FAST_PATHS<C>> : forward_block<C, K, RESET, false>;
}

template <class C, class K> ForwardFn<C, K> choose_forward(const Job& job, bool stream) {
  if (job.soft_reset) return choose_forward<C, K, SOFT>(stream);
  if constexpr (FAST_PATHS<C>)
    if (job.v_reset == 0) return choose_forward<C, K, TO_ZERO>(stream);
  return choose_forward<C, K, TO_VALUE>(stream);
}

template <class C, class K, Reset RESET, int SURROGATE> BackwardFn<C, K> choose_backward(const Job& job, bool stream) {
  constexpr bool S = FAST_PATHS<C> && K::WRITES;
  if (stream) return job.detach_reset ? backward_block<C, K, RESET, SURROGATE, true, S> : backward_block<C, K, RESET, SURROGATE, false, S>;
  return job.detach_reset ? backward_block<C, K, RESET, SURROGATE, true, false> : backward_block<C, K, RESET, SURROGATE, false, false>;
}

template <class C, class K, Reset RESET> BackwardFn<C, K> choose_backward(const Job& job, bool stream) {
  switch (job.surrogate) {
    case TRIANGLE: return choose_backward<C, K, RESET, TRIANGLE>(job, stream);
    case ATAN: return choose_backward<C, K, RESET, ATAN>(job, stream);
    default: return choose_backward<C, K, RESET, SIGMOID>(job, stream);
  }
}

template <class C, class K> BackwardFn<C, K> choose_backward(const Job& job, bool stream) {
  if (job.soft_reset) return choose_backward<C, K, SOFT>(job, stream);
  if constexpr (FAST_PATHS<C>)
    if (job.v_reset == 0) return choose_backward<C, K, TO_ZERO>(job, stream);
  return choose_backward<C, K, TO_VALUE>(job, stream);
}

template <class C> C* at(void* base, int64_t offset) { return base ? static_cast<C*>(base) + offset : nullptr; }
template <class C> const C* at(const void* base, int64_t offset) { return base ? static_cast<const C*>(base) + offset : nullptr; }

// Streaming stores need every row aligned to the vector.
inline bool can_stream(const Job& job, const void* out, int64_t element) {
  return job.stream && reinterpret_cast<uintptr_t>(out) % SJR_VECTOR_BYTES == 0 && job.M * element % SJR_VECTOR_BYTES == 0;
}

// Neurons first..last of one unit. Whole blocks stored in the arithmetic type run in place, the rest passes through
// a scratch: conversions and the last, partial block.
template <class S, class C, class K>
void forward_range(const Job& job, int64_t first, int64_t last, void* memory, K& coupling) {
  constexpr int B = BLOCK<C>;
  const int64_t T = job.T, M = job.M;
  const Neuron<C> n(job);
  const ForwardFn<C, K> staged = choose_forward<C, K>(job, false);
  const ForwardFn<C, K> direct = choose_forward<C, K>(job, can_stream(job, job.s, sizeof(C)) && can_stream(job, job.v_seq, sizeof(C)) && can_stream(job, job.v, sizeof(C)));
  C* const xb = static_cast<C*>(memory);
  C *const sb = xb + T * B, *const vsb = sb + T * B, *const ib = vsb + T * B, *const vb = ib + B;
  for (int64_t i = first; i < last; i += B) {
    const int64_t size = std::min<int64_t>(B, last - i);
    const S* const x = at<S>(job.x, i);
    S* const s = at<S>(job.s, i);
    C *const v = at<C>(job.v, i), *const v_seq = at<C>(job.v_seq, i);
    const C* const v_init = at<C>(job.v_init, i);
    coupling.enter(i, size);
    if constexpr (std::is_same_v<S, C>) {
      if (size == B) {
        direct({x, at<C>(job.gain, 0), v_init, s, v, v_seq, T, M}, n, coupling);
        continue;
      }
    }
    read_rows(x, M, size, T, xb);
    if (v_init) read_rows(v_init, 0, size, 1, ib);
    staged({xb, at<C>(job.gain, 0), v_init ? ib : nullptr, sb, vb, v_seq ? vsb : nullptr, T, B}, n, coupling);
    write_rows(sb, size, T, s, M);
    write_rows(vb, size, 1, v, 0);
    if (v_seq) write_rows(vsb, size, T, v_seq, M);
  }
}

template <class S, class C, class K>
void backward_range(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, K& coupling) {
  constexpr int B = BLOCK<C>, W = LANES<C>;
  const int64_t T = job.T, M = job.M;
  const Neuron<C> n(job);
  const BackwardFn<C, K> staged = choose_backward<C, K>(job, false);
  const BackwardFn<C, K> direct = choose_backward<C, K>(job, can_stream(job, job.gx, sizeof(C)));
  C* const h = static_cast<C*>(memory);
  C *const xb = h + T * B, *const gsb = xb + T * B, *const gvsb = gsb + T * B, *const gxb = gvsb + T * B;
  C *const sums = gxb + T * B, *const ib = sums + T * W, *const gvb = ib + B, *const gib = gvb + B;
  for (int64_t start = first; start < last; start += FLUSH) {  // short sums in C, long ones in double
    const int64_t stop = std::min(last, start + FLUSH);
    std::memset(sums, 0, size_t(T * W) * sizeof(C));
    for (int64_t i = start; i < stop; i += B) {
      const int64_t size = std::min<int64_t>(B, stop - i);
      const S *const x = at<S>(job.x, i), *const gs = at<S>(job.gs, i);
      S* const gx = at<S>(job.gx, i);
      const C *const v_init = at<C>(job.v_init, i), *const gv = at<C>(job.gv, i), *const gvs = at<C>(job.gvs, i);
      C* const gv_init = at<C>(job.gv_init, i);
      coupling.enter(i, size);
      if constexpr (std::is_same_v<S, C>) {
        if (size == B) {
          direct({x, at<C>(job.gain, 0), v_init, gs, gv, gvs, gx, gv_init, h, sums, T, M}, n, coupling);
          coupling.leave(i, size);
          continue;
        }
      }
      read_rows(x, M, size, T, xb);
      read_rows(gs, M, size, T, gsb);
      if (v_init) read_rows(v_init, 0, size, 1, ib);
      if (gv) read_rows(gv, 0, size, 1, gvb);
      if (gvs) read_rows(gvs, M, size, T, gvsb);
      staged({xb, at<C>(job.gain, 0), v_init ? ib : nullptr, gsb, gv ? gvb : nullptr, gvs ? gvsb : nullptr, gxb,
              gv_init ? gib : nullptr, h, sums, T, B}, n, coupling);
      coupling.leave(i, size);
      if constexpr (K::WRITES) write_rows(gxb, size, T, gx, M);
      if (gv_init) write_rows(gib, size, 1, gv_init, 0);
    }
    for (int64_t t = 0; t < T; ++t) gain_sums[t] += sum_lanes(sums + t * W);
  }
}

// For the pieces that forward_range and backward_range cut from their memory.
int64_t blocks_bytes(const Job& job) {
  const int64_t vectors = job.T * (5 * ROWS + 1) + 4 * ROWS;
  return vectors * SJR_VECTOR_BYTES;
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
