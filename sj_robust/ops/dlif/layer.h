// DLIF on x itself or behind a batch norm, for one instruction set.
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

// The per-channel numbers of a block are laid out beside its neurons, so that planes of any size,
// down to one element, run through the same code.
// GRADIENT: writes the gradient of x. TOTALS: adds up the sums per channel that the other gradients
// are made of.
template <class C, bool GRADIENT, bool TOTALS>
struct Normalised {
  static constexpr bool WRITES = GRADIENT;
  static constexpr bool SUMS = TOTALS;
  static constexpr int B = BLOCK<C>;
  static constexpr int W = LANES<C>;
  const Job& job;
  double* const channel_sums;  // [2, channels]
  C* const scale;
  C* const offset;
  C* const mean;
  C* const slope;
  C* const constant;
  C* const g_sum;
  C* const gx_sum;
  int64_t pattern = -1;  // of the block that filled the tables

  Normalised(const Job& j, void* memory, double* sums)
      : job(j),
        channel_sums(sums),
        scale(static_cast<C*>(memory)),
        offset(scale + B),
        mean(offset + B),
        slope(mean + B),
        constant(slope + B),
        g_sum(constant + B),
        gx_sum(g_sum + B) {}

  void put_span(const void* table, const Span& span, C* to) const {
    if (!table) {
      return;
    }
    const C* const values = static_cast<const C*>(table) + span.channel;
    if (job.channels_last) {
      return read_run(values, span.length, to + span.position);
    }
    to += span.position;
    int32_t i = 0;
    for (; i + W <= span.length; i += W) {
      store(to + i, fill(*values));
    }
    for (; i < span.length; ++i) {
      to[i] = *values;
    }
  }

  void add_span(const C* from, const Span& span, double* sums) const {
    from += span.position;
    sums += span.channel;
    int32_t i = 0;
    if (job.channels_last) {
      for (; i < span.length; ++i) {
        sums[i] += double(from[i]);
      }
      return;
    }
    Vec<C> vectors = {};
    for (; i + W <= span.length; i += W) {
      vectors += load(from + i);
    }
    double total = sum_vector<C>(vectors);
    for (; i < span.length; ++i) {
      total += double(from[i]);
    }
    *sums += total;
  }

  void enter(const Block<B>& block) {
    if constexpr (TOTALS) {
      std::memset(g_sum, 0, 2 * B * sizeof(C));
    }
    if (block.pattern >= 0 && block.pattern == pattern) {
      return;
    }
    pattern = block.pattern;
    if (block.size < B) {  // all five: lanes beyond the tensor must not become NaN
      std::memset(scale, 0, 5 * B * sizeof(C));
    }
    for (int i = 0; i < block.n_spans; ++i) {
      const Span& span = block.spans[i];
      put_span(job.scale, span, scale);
      put_span(job.offset, span, offset);
      put_span(job.mean, span, mean);
      put_span(job.slope, span, slope);
      put_span(job.constant, span, constant);
    }
  }

  void leave(const Block<B>& block) {
    if constexpr (TOTALS) {
      for (int i = 0; i < block.n_spans; ++i) {
        add_span(g_sum, block.spans[i], channel_sums);
        add_span(gx_sum, block.spans[i], channel_sums + job.channels);
      }
      if (!job.g_total) {
        return;
      }
      for (int k = 0; k < B; k += W) {
        store(g_sum + k, load(g_sum + k) * load(scale + k));
      }
      write_runs(block.runs, block.n_runs, g_sum, B, 1, static_cast<C*>(job.g_total), 0, false);
    }
  }

  SJR_TARGET_INLINE Vec<C> input(Vec<C> x, int k) const {
    return x * load(scale + k) + load(offset + k);
  }

  template <bool STREAM>
  SJR_TARGET_INLINE void emit(C* gx, Vec<C> g, Vec<C> x, int k) {
    const Vec<C> centred = x - load(mean + k);
    if constexpr (TOTALS) {
      store(g_sum + k, load(g_sum + k) + g);
      store(gx_sum + k, load(gx_sum + k) + g * centred);
    }
    if constexpr (GRADIENT) {
      put<STREAM>(gx, g * load(scale + k) + centred * load(slope + k) + load(constant + k));
    }
  }
};

// The tables of a batch norm lie behind the scratch of the blocks.
int64_t scratch_bytes(const Job& job) {
  return blocks_bytes(job) + 7 * ROWS * SJR_VECTOR_BYTES;
}

void forward(const Job& job, int64_t first, int64_t last, void* memory) {
  with_types(job, [&](auto s, auto c) {
    using S = decltype(s);
    using C = decltype(c);
    if (job.scale) {
      Normalised<C, true, false> norm(job, static_cast<char*>(memory) + blocks_bytes(job), nullptr);
      forward_range<S, C>(job, first, last, memory, norm);
    } else {
      Plain<C> plain;
      forward_range<S, C>(job, first, last, memory, plain);
    }
  });
}

// Writes the gradient of x where there is room for it, and the sums where they are asked for.
void backward(const Job& job,
              int64_t first,
              int64_t last,
              void* memory,
              double* gain_sums,
              double* channel_sums) {
  with_types(job, [&](auto s, auto c) {
    using S = decltype(s);
    using C = decltype(c);
    const auto with = [&](auto coupling) {
      backward_range<S, C>(job, first, last, memory, gain_sums, coupling);
    };
    void* const tables = static_cast<char*>(memory) + blocks_bytes(job);
    if (!job.scale) {
      with(Plain<C>());
    } else if (!job.gx) {
      with(Normalised<C, false, true>(job, tables, channel_sums));
    } else if (job.channel_sums) {
      with(Normalised<C, true, true>(job, tables, channel_sums));
    } else {
      with(Normalised<C, true, false>(job, tables, channel_sums));
    }
  });
}

// Adds, for every channel of one sample, the sums of d and d^2, d = x - shift, to sums [2,
// channels]. Short sums are in C.
template <class S, class C>
void add_planes(const S* x, const C* shift, int64_t channels, int64_t plane, double* sums) {
  constexpr int W = LANES<C>;
  constexpr int PART = 2048 / sizeof(C);
  C widened[PART];
  for (int64_t c = 0; c < channels; ++c, x += plane) {
    double total = 0;
    double squares = 0;
    for (int64_t begin = 0; begin < plane; begin += PART) {
      const int64_t n = std::min<int64_t>(PART, plane - begin);
      const C* part = widened;
      if constexpr (std::is_same_v<S, C>) {
        part = x + begin;
      } else {
        read_run(x + begin, n, widened);
      }
      Vec<C> first[2] = {};
      Vec<C> second[2] = {};
      int64_t i = 0;
      for (; i + 2 * W <= n; i += 2 * W) {
        for (int k = 0; k < 2; ++k) {
          const Vec<C> d = load(part + i + k * W) - shift[c];
          first[k] += d;
          second[k] += d * d;
        }
      }
      if (i > 0) {
        total += sum_vector<C>(first[0] + first[1]);
        squares += sum_vector<C>(second[0] + second[1]);
      }
      for (; i < n; ++i) {
        const double d = double(part[i]) - double(shift[c]);
        total += d;
        squares += d * d;
      }
    }
    sums[c] += total;
    sums[channels + c] += squares;
  }
}

template <class S, class C>
void add_pixels(const S* x, const C* shift, int64_t channels, int64_t plane, double* sums) {
  constexpr int PART = 512 / sizeof(C);
  constexpr int PIXELS = 64;
  C widened[PART], first[PART], second[PART];
  for (int64_t p = 0; p < plane; p += PIXELS) {
    const int64_t end = std::min<int64_t>(plane, p + PIXELS);
    for (int64_t c = 0; c < channels; c += PART) {
      const int64_t n = std::min<int64_t>(PART, channels - c);
      std::memset(first, 0, sizeof first);
      std::memset(second, 0, sizeof second);
      for (int64_t q = p; q < end; ++q) {
        read_run(x + q * channels + c, n, widened);
        for (int64_t i = 0; i < n; ++i) {
          const C d = widened[i] - shift[c + i];
          first[i] += d;
          second[i] += d * d;
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        sums[c + i] += double(first[i]);
      }
      for (int64_t i = 0; i < n; ++i) {
        sums[channels + c + i] += double(second[i]);
      }
    }
  }
}

void add_samples(const Job& job, int64_t first, int64_t last, double* sums) {
  const int64_t size = job.channels * job.plane;
  with_types(job, [&](auto s, auto c) {
    using S = decltype(s);
    using C = decltype(c);
    const auto add = job.channels_last ? add_pixels<S, C> : add_planes<S, C>;
    for (int64_t i = first; i < last; ++i) {
      add(at<S>(job.x, i * size), at<C>(job.mean, 0), job.channels, job.plane, sums);
    }
  });
}

const Code layer = {forward, backward, scratch_bytes, add_samples};

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
