// Batch norm in front of DLIF, for one instruction set: the per-channel numbers of a block are laid out beside its
// neurons, so that planes of any size, down to one element, run through the same code.
#include "../dlif/blocks.h"

namespace sjr {
namespace SJR_SET {
namespace {

// GRADIENT: writes the gradient of x. Both kinds add up the sums per channel that the other gradients are made of.
template <class C, bool GRADIENT> struct Normalised {
  static constexpr bool WRITES = GRADIENT;
  static constexpr int B = BLOCK<C>, W = LANES<C>;
  const Job& job;
  double* const channel_sums;  // [channels, 2]; null in the forward pass
  C *const scale, *const offset, *const mean, *const slope, *const constant, *const g_sum, *const gx_sum;

  Normalised(const Job& j, void* memory, double* sums)
      : job(j), channel_sums(sums), scale(static_cast<C*>(memory)), offset(scale + B), mean(offset + B), slope(mean + B),
        constant(slope + B), g_sum(constant + B), gx_sum(g_sum + B) {}

  int64_t channel_of(int64_t neuron) const { return neuron / job.plane % job.channels; }

  void spread(const void* table, int64_t first, int64_t size, C* to) const {
    if (!table) return;
    const C* const from = static_cast<const C*>(table);
    const int64_t left = job.plane - first % job.plane;  // elements until the next channel begins
    int64_t channel = channel_of(first);
    if (left >= size) {
      for (int i = 0; i < B; i += W) store(to + i, fill(from[channel]));
      return;
    }
    for (int64_t i = 0, next = left; i < B; ++i) {
      if (i == next) channel = channel + 1 == job.channels ? 0 : channel + 1, next += job.plane;
      to[i] = i < size ? from[channel] : C(0);
    }
  }

  void enter(int64_t first, int64_t size) {
    spread(job.scale, first, size, scale);
    spread(job.offset, first, size, offset);
    if (!channel_sums) return;
    spread(job.mean, first, size, mean);
    if (GRADIENT) spread(job.slope, first, size, slope), spread(job.constant, first, size, constant);
    std::memset(g_sum, 0, 2 * B * sizeof(C));
  }

  void leave(int64_t first, int64_t size) {
    int64_t channel = channel_of(first);
    if (job.plane - first % job.plane >= size) {  // lanes beyond size hold zeros
      for (int i = W; i < B; i += W) {
        store(g_sum, load(g_sum) + load(g_sum + i));
        store(gx_sum, load(gx_sum) + load(gx_sum + i));
      }
      channel_sums[2 * channel] += sum_lanes(g_sum);
      channel_sums[2 * channel + 1] += sum_lanes(gx_sum);
      return;
    }
    for (int64_t i = 0, next = job.plane - first % job.plane; i < size; ++i) {
      if (i == next) channel = channel + 1 == job.channels ? 0 : channel + 1, next += job.plane;
      channel_sums[2 * channel] += double(g_sum[i]);
      channel_sums[2 * channel + 1] += double(gx_sum[i]);
    }
  }

  SJR_TARGET_INLINE Vec<C> input(Vec<C> x, int k) const { return x * load(scale + k) + load(offset + k); }

  template <bool STREAM> SJR_TARGET_INLINE void emit(C* gx, Vec<C> g, Vec<C> x, int k) {
    const Vec<C> centred = x - load(mean + k);
    store(g_sum + k, load(g_sum + k) + g);
    store(gx_sum + k, load(gx_sum + k) + g * centred);
    if constexpr (GRADIENT) put<STREAM>(gx, g * load(scale + k) + centred * load(slope + k) + load(constant + k));
  }
};

// The tables lie behind the scratch of the blocks.
template <class C> void* tables(const Job& job, void* memory) { return static_cast<char*>(memory) + blocks_bytes(job); }

int64_t scratch_bytes(const Job& job) { return blocks_bytes(job) + 7 * ROWS * SJR_VECTOR_BYTES; }

template <class C> void normalised_forward(const Job& job, int64_t first, int64_t last, void* memory) {
  Normalised<C, true> norm(job, tables<C>(job, memory), nullptr);
  forward_range<C, C>(job, first, last, memory, norm);
}

template <class C>
void normalised_backward(const Job& job, int64_t first, int64_t last, void* memory, double* gain_sums, double* channel_sums) {
  if (job.gx) {
    Normalised<C, true> norm(job, tables<C>(job, memory), channel_sums);
    backward_range<C, C>(job, first, last, memory, gain_sums, norm);
  } else {
    Normalised<C, false> norm(job, tables<C>(job, memory), channel_sums);
    backward_range<C, C>(job, first, last, memory, gain_sums, norm);
  }
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
    alignas(SJR_VECTOR_BYTES) C lanes[W];
    double total = 0, squares = 0;
    if (i > 0) {
      store(lanes, first[0] + first[1]);
      total = sum_lanes(lanes);
      store(lanes, second[0] + second[1]);
      squares = sum_lanes(lanes);
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
