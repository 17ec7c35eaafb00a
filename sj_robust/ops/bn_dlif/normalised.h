// Batch norm in front of DLIF, for one instruction set: the per-channel numbers of a block are laid out beside its
// neurons, so that planes of any size, down to one element, run through the same code.
#include "../dlif/blocks.h"

namespace sjr {
namespace SJR_SET {
namespace {

// GRADIENT: writes the gradient of x. TOTALS: adds up the sums per channel that the other gradients are made of.
template <class C, bool GRADIENT, bool TOTALS> struct Normalised {
  static constexpr bool WRITES = GRADIENT, SUMS = TOTALS;
  static constexpr int B = BLOCK<C>, W = LANES<C>;
  const Job& job;
  double* const channel_sums;  // [channels, 2]
  C *const scale, *const offset, *const mean, *const slope, *const constant, *const g_sum, *const gx_sum;
  int64_t channel = -1;  // the one that fills the tables, if there is one

  Normalised(const Job& j, void* memory, double* sums)
      : job(j), channel_sums(sums), scale(static_cast<C*>(memory)), offset(scale + B), mean(offset + B), slope(mean + B),
        constant(slope + B), g_sum(constant + B), gx_sum(g_sum + B) {}

  // Calls run(channel, begin, end) for every piece of the block that lies in one channel.
  template <class Run> SJR_TARGET_INLINE void runs(int64_t first, int64_t size, Run run) const {
    int64_t c = first / job.plane % job.channels, end = job.plane - first % job.plane;
    for (int64_t begin = 0; begin < size; begin = end, end += job.plane, c = c + 1 == job.channels ? 0 : c + 1)
      run(c, begin, std::min(end, size));
  }

  static SJR_TARGET_INLINE void put_run(const void* table, int64_t c, int64_t begin, int64_t end, C* to) {
    if (!table) return;
    const C value = static_cast<const C*>(table)[c];
    int64_t i = begin;
    for (; i + W <= end; i += W) store(to + i, fill(value));
    for (; i < end; ++i) to[i] = value;
  }

  static SJR_TARGET_INLINE double sum_run(const C* from, int64_t begin, int64_t end) {
    Vec<C> vectors = {};
    int64_t i = begin;
    for (; i + W <= end; i += W) vectors += load(from + i);
    double total = sum_vector<C>(vectors);
    for (; i < end; ++i) total += double(from[i]);
    return total;
  }

  void enter(int64_t first, int64_t size) {
    if constexpr (TOTALS) std::memset(g_sum, 0, 2 * B * sizeof(C));
    const int64_t here = first % job.plane + B <= job.plane ? first / job.plane % job.channels : -1;
    if (here >= 0 && here == channel) return;
    channel = here;
    if (size < B) std::memset(scale, 0, 5 * B * sizeof(C));  // all five: lanes beyond the tensor must not become NaN
    runs(first, size, [this](int64_t c, int64_t begin, int64_t end) {
      put_run(job.scale, c, begin, end, scale);
      put_run(job.offset, c, begin, end, offset);
      put_run(job.mean, c, begin, end, mean);
      put_run(job.slope, c, begin, end, slope);
      put_run(job.constant, c, begin, end, constant);
    });
  }

  void leave(int64_t first, int64_t size) {
    if constexpr (TOTALS) {
      runs(first, size, [this](int64_t c, int64_t begin, int64_t end) {
        channel_sums[2 * c] += sum_run(g_sum, begin, end);
        channel_sums[2 * c + 1] += sum_run(gx_sum, begin, end);
      });
    }
  }

  SJR_TARGET_INLINE Vec<C> input(Vec<C> x, int k) const { return x * load(scale + k) + load(offset + k); }

  template <bool STREAM> SJR_TARGET_INLINE void emit(C* gx, Vec<C> g, Vec<C> x, int k) {
    const Vec<C> centred = x - load(mean + k);
    if constexpr (TOTALS) {
      store(g_sum + k, load(g_sum + k) + g);
      store(gx_sum + k, load(gx_sum + k) + g * centred);
    }
    if constexpr (GRADIENT) put<STREAM>(gx, g * load(scale + k) + centred * load(slope + k) + load(constant + k));
  }
};

// The tables lie behind the scratch of the blocks.
template <class C> void* tables(const Job& job, void* memory) { return static_cast<char*>(memory) + blocks_bytes(job); }

int64_t scratch_bytes(const Job& job) { return blocks_bytes(job) + 7 * ROWS * SJR_VECTOR_BYTES; }

template <class C> void normalised_forward(const Job& job, int64_t first, int64_t last, void* memory) {
  Normalised<C, true, false> norm(job, tables<C>(job, memory), nullptr);
  forward_range<C, C>(job, first, last, memory, norm);
}

template <class C, bool GRADIENT, bool TOTALS>
void normalised_backward(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, double* channel_sums) {
  Normalised<C, GRADIENT, TOTALS> norm(job, tables<C>(job, memory), channel_sums);
  backward_range<C, C>(job, first, last, memory, gain_sums, norm);
}

// Writes the gradient of x where there is room for it, and the sums where they are asked for.
template <class C>
void normalised_backward(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, double* channel_sums) {
  if (!job.gx) return normalised_backward<C, false, true>(job, first, last, memory, gain_sums, channel_sums);
  if (job.channel_sums) return normalised_backward<C, true, true>(job, first, last, memory, gain_sums, channel_sums);
  return normalised_backward<C, true, false>(job, first, last, memory, gain_sums, channel_sums);
}

void forward(const Job& job, int64_t first, int64_t last, void* memory) {
  if (job.storage == FLOAT64) return normalised_forward<double>(job, first, last, memory);
  return normalised_forward<float>(job, first, last, memory);
}

void backward(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, double* channel_sums) {
  if (job.storage == FLOAT64) return normalised_backward<double>(job, first, last, memory, gain_sums, channel_sums);
  return normalised_backward<float>(job, first, last, memory, gain_sums, channel_sums);
}

// Adds, for every channel of one sample [channels, plane], the sums of d and d^2, d = x - shift, to sums [channels, 2].
template <class C> void add_sample(const C* x, const C* shift, int64_t channels, int64_t plane, double* sums) {
  constexpr int W = LANES<C>;
  for (int64_t c = 0; c < channels; ++c, x += plane) {
    Vec<C> first[2] = {}, second[2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= plane; i += 2 * W) {
      for (int k = 0; k < 2; ++k) {
        const Vec<C> d = load(x + i + k * W) - shift[c];
        first[k] += d;
        second[k] += d * d;
      }
    }
    double total = 0, squares = 0;
    if (i > 0) {
      total = sum_vector<C>(first[0] + first[1]);
      squares = sum_vector<C>(second[0] + second[1]);
    }
    for (; i < plane; ++i) {
      const double d = double(x[i]) - double(shift[c]);
      total += d;
      squares += d * d;
    }
    sums[2 * c] += total;
    sums[2 * c + 1] += squares;
  }
}

void add_samples(const Job& job, int64_t first, int64_t last, double* sums) {
  const int64_t size = job.channels * job.plane;
  for (int64_t i = first; i < last; ++i) {
    if (job.storage == FLOAT64)
      add_sample(static_cast<const double*>(job.x) + i * size, static_cast<const double*>(job.mean), job.channels, job.plane, sums);
    else
      add_sample(static_cast<const float*>(job.x) + i * size, static_cast<const float*>(job.mean), job.channels, job.plane, sums);
  }
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
