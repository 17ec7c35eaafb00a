// DLIF on blocks of neurons, for one instruction set. A block walks through all T steps with its
// potentials in the first-level cache; the backward pass first computes h again into a scratch that
// stays there too. What happens to x before the neuron, and to its gradient behind it, is a
// Coupling: Plain (nothing) or Normalised in layer.h. Its functions:
//   enter(block), leave(block)               before and after a block
//   input(x, k)                              current of the neuron, k elements into the block
//   emit<STREAM>(gx, g, x, k)                gradient g of that current turned into one of x
// and its constants: WRITES (emit writes gx), SUMS (the gradient of the gain is wanted).
#include "simd.h"
#include "walk.h"

namespace sjr {
namespace SJR_SET {
namespace {

// What a spike does to the potential. TO_ZERO is TO_VALUE with v_reset = 0, nearly every network's,
// in fewer instructions.
enum Reset { TO_VALUE, TO_ZERO, SOFT };

// Neuron constants in the arithmetic type. The surrogate's are its `height` at 0 (of the sigmoid
// four times that) and its `slope`, by which z is scaled.
template <class C>
struct Neuron;
template <int SURROGATE, class C>
void row_of_slopes(const C* h, const Neuron<C>& n, C* g);

template <class C>
struct Neuron {
  C decay, leak_current, v_threshold, v_reset, v_start, height, slope;
  void (*slopes)(const C* h, const Neuron& n, C* g);  // of a row
  explicit Neuron(const Job& job)
      : decay(C(job.decay)),
        leak_current(C(job.leak_current)),
        v_threshold(C(job.v_threshold)),
        v_reset(C(job.v_reset)),
        v_start(job.soft_reset ? C(0) : C(job.v_reset)),
        height(C(job.alpha)),
        slope(C(job.alpha)),
        slopes(nullptr) {
    switch (job.surrogate) {
      case TRIANGLE:
        slope = C(job.alpha * job.alpha);
        break;
      case ATAN:
        height = C(job.alpha / 2);
        slope = C(1.57079632679489662 * job.alpha);
        break;
      case SIGMOID:
        break;
      case EXPONENTIAL:
        height = C(job.alpha / 2);
        slopes = row_of_slopes<EXPONENTIAL, C>;
        break;
      case SOFT_SIGN:
        height = C(job.alpha / 2);
        slopes = row_of_slopes<SOFT_SIGN, C>;
        break;
      case SUPER_SPIKE:
        slope = C(1);
        slopes = row_of_slopes<SOFT_SIGN, C>;
        break;
      default:
        height = C(job.alpha * 0.56418958354775629);
        slopes = row_of_slopes<ERF, C>;
    }
  }
};

template <int SURROGATE, class C>
SJR_INLINE Vec<C> derivative(Vec<C> z, const Neuron<C>& n) {
  if constexpr (SURROGATE == TRIANGLE) {
    return positive_part<C>(n.height - n.slope * magnitude<C>(z));
  } else if constexpr (SURROGATE == ATAN) {
    const Vec<C> y = n.slope * z;
    return n.height / (C(1) + y * y);
  } else if constexpr (SURROGATE == SIGMOID) {
    const Vec<C> s = C(1) / (C(1) + exponential(-n.slope * z));
    return n.height * s * (C(1) - s);
  } else if constexpr (SURROGATE == EXPONENTIAL) {
    return n.height * exponential(-n.slope * magnitude<C>(z));
  } else if constexpr (SURROGATE == SOFT_SIGN) {
    const Vec<C> root = C(1) + n.slope * magnitude<C>(z);
    return n.height / (root * root);
  } else {
    const Vec<C> y = n.slope * z;
    return n.height * exponential(-(y * y));
  }
}

// The first three are compiled into backward_block, the others into a row of slopes that it reads:
// a loop of their own for each instead of every variant of a block, which would be twice the code
// of the whole library.
constexpr int BY_ROWS = EXPONENTIAL;
template <int SURROGATE, class C>
__attribute__((noinline)) void row_of_slopes(const C* h, const Neuron<C>& n, C* g) {
  for (int k = 0; k < BLOCK<C>; k += LANES<C>) {
    store(g + k, derivative<SURROGATE>(load(h + k) - n.v_threshold, n));
  }
}

template <Reset RESET, class C>
SJR_INLINE Vec<C> after_spike(Vec<C> h, const Neuron<C>& n) {
  if constexpr (RESET == SOFT) {
    return h - n.v_threshold;
  } else if constexpr (RESET == TO_ZERO) {
    return Vec<C>{};
  } else {
    return fill(n.v_reset);
  }
}

template <Reset RESET, class C>
SJR_INLINE Vec<C> after_reset(Vec<C> h, const Neuron<C>& n) {
  return h >= n.v_threshold ? after_spike<RESET>(h, n) : h;
}

template <Reset RESET, class C>
SJR_INLINE Vec<C> charge(Vec<C> v, Vec<C> x, C gain, const Neuron<C>& n) {
  const Vec<C> h = v * n.decay + x * gain;
  return RESET == TO_VALUE ? h + n.leak_current : h;
}

// Asks for what the next block will read in this row: T short rows defeat the processor's own
// prefetching, and arithmetic and memory would take turns. Beyond the tensor it has no effect.
template <class C>
SJR_INLINE void fetch_ahead(const C* row, int k) {
  if (k * SJR_VECTOR_BYTES % 64 == 0) {
    __builtin_prefetch(row + BLOCK<C> + k * LANES<C>);
  }
}

// One block; consecutive steps lie `stride` apart, those of x and s x_stride and s_stride; v_init,
// v_seq and current may be null.
template <class C>
struct ForwardBlock {
  const C *x, *gain, *v_init;
  C *s, *v, *v_seq, *current;
  int64_t T, stride, x_stride, s_stride;
};

template <class C, class Coupling, Reset RESET, bool STREAM>
__attribute__((noinline)) void forward_block(const ForwardBlock<C>& b,
                                             const Neuron<C> n,
                                             Coupling& coupling) {
  constexpr int W = LANES<C>;
  Vec<C> v[ROWS];
  for (int k = 0; k < ROWS; ++k) {
    v[k] = b.v_init ? load(b.v_init + k * W) : fill(n.v_start);
  }
  const C* x = b.x;
  C* s = b.s;
  C* v_seq = b.v_seq;
  C* current = b.current;
  for (int64_t t = 0; t < b.T; ++t, x += b.x_stride, s += b.s_stride) {
    const C gain = b.gain[t];
    SJR_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const Vec<C> h = charge<RESET>(v[k], coupling.input(load(x + k * W), k * W), gain, n);
      fetch_ahead<C>(x, k);
      put<STREAM>(s + k * W, h >= n.v_threshold ? fill(C(1)) : Vec<C>{});
      v[k] = after_reset<RESET>(h, n);
    }
    if (v_seq) {
      for (int k = 0; k < ROWS; ++k) {
        put<STREAM>(v_seq + k * W, v[k]);
      }
      v_seq += b.stride;
    }
    if (current) {
      for (int k = 0; k < ROWS; ++k) {
        put<STREAM>(current + k * W, coupling.input(load(x + k * W), k * W));
      }
      current += b.stride;
    }
  }
  for (int k = 0; k < ROWS; ++k) {
    put<STREAM>(b.v + k * W, v[k]);
  }
}

// One block; v_init, gv, gvs, g_current and gv_init may be null. h is a scratch [T, BLOCK];
// gain_sums [T, LANES] is added to.
template <class C>
struct BackwardBlock {
  const C *x, *gain, *v_init, *gs, *gv, *gvs, *g_current;
  C *gx, *gv_init, *h, *gain_sums;
  int64_t T, stride, x_stride, gs_stride;
};

template <class C, class Coupling, Reset RESET, int SURROGATE, bool DETACH, bool STREAM>
__attribute__((noinline)) void backward_block(const BackwardBlock<C>& b,
                                              const Neuron<C> n,
                                              Coupling& coupling) {
  constexpr int W = LANES<C>;
  Vec<C> v[ROWS];
  for (int k = 0; k < ROWS; ++k) {
    v[k] = b.v_init ? load(b.v_init + k * W) : fill(n.v_start);
  }
  for (int64_t t = 0; t < b.T; ++t) {
    const C gain = b.gain[t];
    const C* x = b.x + t * b.x_stride;
    C* h_row = b.h + t * BLOCK<C>;
    SJR_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const Vec<C> h = charge<RESET>(v[k], coupling.input(load(x + k * W), k * W), gain, n);
      fetch_ahead<C>(x, k);
      store(h_row + k * W, h);
      v[k] = after_reset<RESET>(h, n);
    }
  }
  for (int k = 0; k < ROWS; ++k) {
    v[k] = b.gv ? load(b.gv + k * W) : Vec<C>{};  // from here on the gradient of v
  }
  for (int64_t t = b.T - 1; t >= 0; --t) {
    const C gain = b.gain[t];
    const C* x = b.x + t * b.x_stride;
    const C* gs = b.gs + t * b.gs_stride;
    const C* h_row = b.h + t * BLOCK<C>;
    C* gx = b.gx + t * b.stride;
    if (b.gvs) {
      for (int k = 0; k < ROWS; ++k) {
        v[k] += load(b.gvs + t * b.stride + k * W);
      }
    }
    [[maybe_unused]] Vec<C> sums = load(b.gain_sums + t * W);
    alignas(SJR_VECTOR_BYTES) C slopes[SURROGATE == BY_ROWS ? BLOCK<C> : W];
    if constexpr (SURROGATE == BY_ROWS) {
      n.slopes(h_row, n, slopes);
    }
    SJR_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const Vec<C> h = load(h_row + k * W);
      Vec<C> g;
      if constexpr (SURROGATE == BY_ROWS) {
        g = load(slopes + k * W);
      } else {
        g = derivative<SURROGATE>(h - n.v_threshold, n);
      }
      Vec<C> through_spike = load(gs + k * W);
      Vec<C> gh;
      if constexpr (RESET == SOFT) {
        if constexpr (!DETACH) {
          through_spike -= v[k] * n.v_threshold;
        }
        gh = through_spike * g + v[k];
      } else {
        if constexpr (!DETACH) {
          if constexpr (RESET == TO_ZERO) {
            through_spike -= v[k] * h;
          } else {
            through_spike += v[k] * (n.v_reset - h);
          }
        }
        gh = through_spike * g + (h >= n.v_threshold ? Vec<C>{} : v[k]);
      }
      fetch_ahead<C>(gs, k);
      const Vec<C> xk = load(x + k * W);
      Vec<C> gc = gh * gain;
      if (b.g_current) {
        gc += load(b.g_current + t * b.stride + k * W);
      }
      coupling.template emit<STREAM>(gx + k * W, gc, xk, k * W);
      if constexpr (Coupling::SUMS) {
        sums += gh * coupling.input(xk, k * W);
      }
      v[k] = gh * n.decay;
    }
    if constexpr (Coupling::SUMS) {
      store(b.gain_sums + t * W, sums);
    }
  }
  if (b.gv_init) {
    for (int k = 0; k < ROWS; ++k) {
      store(b.gv_init + k * W, v[k]);
    }
  }
}

template <class C, class K>
using ForwardFn = void (*)(const ForwardBlock<C>&, const Neuron<C>, K&);
template <class C, class K>
using BackwardFn = void (*)(const BackwardBlock<C>&, const Neuron<C>, K&);

// Only float is worth further copies of the code: large tensors with streaming stores, and a reset
// to zero.
template <class C>
constexpr bool FAST_PATHS = std::is_same_v<C, float>;

template <class C, class K, Reset RESET>
ForwardFn<C, K> choose_forward(bool stream) {
  return stream ? forward_block<C, K, RESET, FAST_PATHS<C>> : forward_block<C, K, RESET, false>;
}

template <class C, class K>
ForwardFn<C, K> choose_forward(const Job& job, bool stream) {
  if (job.soft_reset) {
    return choose_forward<C, K, SOFT>(stream);
  }
  if constexpr (FAST_PATHS<C>) {
    if (job.v_reset == 0) {
      return choose_forward<C, K, TO_ZERO>(stream);
    }
  }
  return choose_forward<C, K, TO_VALUE>(stream);
}

template <class C, class K, Reset RESET, int SURROGATE>
BackwardFn<C, K> choose_backward(const Job& job, bool stream) {
  constexpr bool S = FAST_PATHS<C> && K::WRITES;
  if (stream) {
    return job.detach_reset ? backward_block<C, K, RESET, SURROGATE, true, S>
                            : backward_block<C, K, RESET, SURROGATE, false, S>;
  }
  return job.detach_reset ? backward_block<C, K, RESET, SURROGATE, true, false>
                          : backward_block<C, K, RESET, SURROGATE, false, false>;
}

template <class C, class K, Reset RESET>
BackwardFn<C, K> choose_backward(const Job& job, bool stream) {
  switch (job.surrogate) {
    case TRIANGLE:
      return choose_backward<C, K, RESET, TRIANGLE>(job, stream);
    case ATAN:
      return choose_backward<C, K, RESET, ATAN>(job, stream);
    case SIGMOID:
      return choose_backward<C, K, RESET, SIGMOID>(job, stream);
    default:
      return choose_backward<C, K, RESET, BY_ROWS>(job, stream);
  }
}

template <class C, class K>
BackwardFn<C, K> choose_backward(const Job& job, bool stream) {
  if (job.soft_reset) {
    return choose_backward<C, K, SOFT>(job, stream);
  }
  if constexpr (FAST_PATHS<C>) {
    if (job.v_reset == 0) {
      return choose_backward<C, K, TO_ZERO>(job, stream);
    }
  }
  return choose_backward<C, K, TO_VALUE>(job, stream);
}

template <class C>
C* at(void* base, int64_t offset) {
  return base ? static_cast<C*>(base) + offset : nullptr;
}
template <class C>
const C* at(const void* base, int64_t offset) {
  return base ? static_cast<const C*>(base) + offset : nullptr;
}

// Streaming stores need every row aligned to the vector.
inline bool can_stream(const Job& job, const void* out, int64_t element) {
  return job.stream && reinterpret_cast<uintptr_t>(out) % SJR_VECTOR_BYTES == 0 &&
         job.M * element % SJR_VECTOR_BYTES == 0;
}

// Whole blocks stored in the arithmetic type run in place, the rest passes through copies:
// conversions, pieces of several rows, the last, partial block.
template <class S, class C>
struct Places {
  const Job& job;
  const Block<BLOCK<C>>& block;
  const Block<BLOCK<C>>& ahead;
  const bool in_place = std::is_same_v<S, C> && block.is_row();

  int64_t stride(int64_t of_tensor) const { return in_place ? of_tensor : BLOCK<C>; }

  // Where T steps of a tensor are read: there, or in a copy; null where the call has none.
  template <class N>
  const C* input(const N* tensor, int64_t steps_apart, int64_t T, C* copy) const {
    if (!tensor) {
      return nullptr;
    }
    if constexpr (std::is_same_v<N, C>) {
      if (in_place) {
        return tensor + block.runs[0].offset;
      }
    }
    if (!block.is_full()) {  // lanes beyond the tensor are zero
      std::memset(copy, 0, size_t(T * BLOCK<C>) * sizeof(C));
    }
    read_runs(
        block.runs, block.n_runs, ahead.runs, ahead.n_runs, tensor, steps_apart, T, copy, BLOCK<C>);
    return copy;
  }

  // Where they are written; `bring` takes a copy to the tensor.
  C* output(void* tensor, C* copy) const {
    return in_place ? at<C>(tensor, block.runs[0].offset) : tensor ? copy : nullptr;
  }
  template <class N>
  void bring(N* tensor, int64_t T, const C* copy) const {
    if (tensor && !in_place) {
      write_runs(block.runs, block.n_runs, copy, BLOCK<C>, T, tensor, job.M, job.stream);
    }
  }
};

// Items first..last of one unit. Spikes that are pooled pass through a copy in any case.
template <class S, class C, class K>
void forward_range(const Job& job, int64_t first, int64_t last, void* memory, K& coupling) {
  constexpr int B = BLOCK<C>;
  const int64_t T = job.T;
  const int64_t pooled_M = Shape(job).pooled_M;
  const Neuron<C> n(job);
  const ForwardFn<C, K> staged = choose_forward<C, K>(job, false);
  const ForwardFn<C, K> direct = choose_forward<C, K>(
      job,
      !job.pool && can_stream(job, job.s, sizeof(C)) && can_stream(job, job.v_seq, sizeof(C)) &&
          can_stream(job, job.current, sizeof(C)) && can_stream(job, job.v, sizeof(C)));
  C* const xb = static_cast<C*>(memory);
  C* const sb = xb + T * B;
  C* const vsb = sb + T * B;
  C* const cb = vsb + T * B;
  C* const pb = cb + T * B;
  C* const ib = pb + T * B / 4;
  C* const vb = ib + B;
  Walk<B> walk(job, first, last);
  while (walk.next()) {
    const Block<B>& block = walk.block();
    const Places<S, C> places{job, block, walk.ahead()};
    coupling.enter(block);
    ForwardBlock<C> b;
    b.x = places.input(at<S>(job.x, 0), job.x_stride, T, xb);
    b.gain = at<C>(job.gain, 0);
    b.v_init = places.input(at<C>(job.v_init, 0), 0, 1, ib);
    b.s = job.pool ? sb : places.output(job.s, sb);
    b.v = places.output(job.v, vb);
    b.v_seq = places.output(job.v_seq, vsb);
    b.current = places.output(job.current, cb);
    b.T = T;
    b.stride = places.stride(job.M);
    b.x_stride = places.stride(job.x_stride);
    b.s_stride = job.pool ? B : b.stride;
    (places.in_place ? direct : staged)(b, n, coupling);
    places.bring(at<C>(job.v, 0), 1, vb);
    places.bring(at<C>(job.v_seq, 0), T, vsb);
    places.bring(at<C>(job.current, 0), T, cb);
    if (job.pool) {
      pool_block<C>(job, block, sb, pb);
      write_runs(block.pooled, block.n_pooled, pb, B / 4, T, at<S>(job.s, 0), pooled_M, job.stream);
    } else {
      places.bring(at<S>(job.s, 0), T, sb);
    }
  }
}

template <class S, class C, class K>
void backward_range(
    const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, K& coupling) {
  constexpr int B = BLOCK<C>;
  constexpr int W = LANES<C>;
  const int64_t T = job.T;
  const Neuron<C> n(job);
  const BackwardFn<C, K> staged = choose_backward<C, K>(job, false);
  const BackwardFn<C, K> direct = choose_backward<C, K>(job, can_stream(job, job.gx, sizeof(C)));
  C* const h = static_cast<C*>(memory);
  C* const xb = h + T * B;
  C* const gsb = xb + T * B;
  C* const gvsb = gsb + T * B;
  C* const gxb = gvsb + T * B;
  C* const gcb = gxb + T * B;
  C* const pb = gcb + T * B;
  C* const sums = pb + T * B / 4;
  C* const ib = sums + T * W;
  C* const gvb = ib + B;
  C* const gib = gvb + B;
  std::memset(sums, 0, size_t(T * W) * sizeof(C));
  int64_t summed = 0;
  const auto flush = [&] {  // short sums in C, long ones in double
    for (int64_t t = 0; t < T; ++t) {
      gain_sums[t] += sum_lanes(sums + t * W);
    }
    std::memset(sums, 0, size_t(T * W) * sizeof(C));
    summed = 0;
  };
  Walk<B> walk(job, first, last);
  while (walk.next()) {
    const Block<B>& block = walk.block();
    const Block<B>& ahead = walk.ahead();
    const Places<S, C> places{job, block, ahead};
    coupling.enter(block);
    BackwardBlock<C> b;
    b.stride = places.stride(job.M);
    b.gs_stride = job.pool ? B : b.stride;
    if (job.pool) {
      read_runs(block.pooled,
                block.n_pooled,
                ahead.pooled,
                ahead.n_pooled,
                at<S>(job.gs, 0),
                Shape(job).pooled_M,
                T,
                pb,
                B / 4);
      share_block<C>(job, block, pb, gsb);
      b.gs = gsb;
    } else {
      b.gs = places.input(at<S>(job.gs, 0), job.M, T, gsb);
    }
    b.x = places.input(at<S>(job.x, 0), job.x_stride, T, xb);
    b.gain = at<C>(job.gain, 0);
    b.v_init = places.input(at<C>(job.v_init, 0), 0, 1, ib);
    b.gv = places.input(at<C>(job.gv, 0), 0, 1, gvb);
    b.gvs = places.input(at<C>(job.gvs, 0), job.M, T, gvsb);
    b.g_current = places.input(at<C>(job.g_current, 0), job.M, T, gcb);
    b.gx = places.output(job.gx, gxb);
    b.gv_init = places.output(job.gv_init, gib);
    b.h = h;
    b.gain_sums = sums;
    b.T = T;
    b.x_stride = places.stride(job.x_stride);
    (places.in_place ? direct : staged)(b, n, coupling);
    if constexpr (K::WRITES) {
      places.bring(at<S>(job.gx, 0), T, gxb);
    }
    places.bring(at<C>(job.gv_init, 0), 1, gib);
    coupling.leave(block);
    summed += block.size;
    if (summed >= FLUSH) {
      flush();
    }
  }
  flush();
}

// For the pieces that forward_range and backward_range cut from their memory.
int64_t blocks_bytes(const Job& job) {
  const int64_t vectors = job.T * (6 * ROWS + ROWS / 4 + 1) + 4 * ROWS;
  return vectors * SJR_VECTOR_BYTES;
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
