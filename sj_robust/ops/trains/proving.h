// Bounds of steps and of sums over trains, for one instruction set. What is computed stands in
// reference.py; every number is the result of the same operations in the same order.
namespace sjr {
namespace SJR_SET {
namespace {

constexpr int BLOCK_OF_STEPS = 64;  // neurons that walk through all steps together
constexpr int B = BLOCK_OF_STEPS;

SJR_INLINE double smaller(double a, double b) {
  return b < a ? b : a;
}
SJR_INLINE double larger(double a, double b) {
  return a < b ? b : a;
}
SJR_INLINE double magnitude_of(double a) {
  return a < 0 ? -a : a;
}

struct StepsBlock {
  const StepsJob& job;
  const Slots slots;
  const int64_t first;
  const int n;
  double* const past;  // [T, MAX_SLOTS, 2, B]: least and largest charged potential of a slot
  alignas(64) double v_low[B], v_high[B], h_low[B], h_high[B], error[B], drift[B];
  alignas(64) double low[B], high[B], any_low[B], any_high[B];
  alignas(64) int64_t reached[B], later[B], sure[B], possible[B], sure_bits[B], possible_bits[B];

  SJR_TARGET_INLINE StepsBlock(const StepsJob& j, int64_t f, int count, double* p)
      : job(j), slots{j.kept}, first(f), n(count), past(p) {}

  SJR_TARGET_INLINE const double* row(const double* of, int64_t t) const {
    return of + t * job.M + first;
  }
  SJR_TARGET_INLINE double* row(double* of, int64_t t) const { return of + t * job.M + first; }
  SJR_TARGET_INLINE double* past_low(int64_t t, int64_t slot) const {
    return past + (t * MAX_SLOTS + slot) * 2 * B;
  }
  SJR_TARGET_INLINE double* past_high(int64_t t, int64_t slot) const {
    return past_low(t, slot) + B;
  }

  SJR_TARGET_INLINE void charge(int64_t t) {
    const double decay = job.decay;
    const double gain = job.gains[t];
    const double rest = job.rest;
    const double size_of_rest = magnitude_of(rest);
    const double size_of_gain = magnitude_of(gain);
    const double unit = job.charge_unit;
    const double least = job.charge_least;
    const double* x_low = row(job.low, t);
    const double* x_high = row(job.high, t);
    const double* small = gain < 0 ? x_high : x_low;
    const double* large = gain < 0 ? x_low : x_high;
    const double leak = (1.0 - decay) * rest;
    SJR_APART
    for (int i = 0; i < n; ++i) {
      double below = decay * v_low[i] + gain * small[i];
      double above = decay * v_high[i] + gain * large[i];
      if (rest != 0) {
        below = below + leak;
        above = above + leak;
      }
      const double v = larger(magnitude_of(v_low[i]), magnitude_of(v_high[i]));
      const double x = larger(magnitude_of(x_low[i]), magnitude_of(x_high[i]));
      const double size = (v + size_of_gain * x) + size_of_rest;
      error[i] = unit * size + least;
      h_low[i] = below - error[i];
      h_high[i] = above + error[i];
    }
  }

  // Whether bounds of a potential make a spike sure, and possible.
  SJR_TARGET_INLINE void fires(int64_t t, const double* from, const double* to) {
    SJR_APART
    for (int i = 0; i < n; ++i) {
      sure[i] = from[i] >= job.above;
      possible[i] = to[i] >= job.below;
    }
    if (!job.known_low)
      return;
    const double* known_low = row(job.known_low, t);
    const double* known_high = row(job.known_high, t);
    SJR_APART
    for (int i = 0; i < n; ++i) {
      sure[i] |= known_low[i] > 0;
      possible[i] &= known_high[i] > 0;
    }
  }

  SJR_TARGET_INLINE void clamp() {
    SJR_APART
    for (int i = 0; i < n; ++i) {
      const double fired = larger(h_low[i], job.below);
      const double silent = smaller(h_high[i], job.above);
      h_low[i] = sure[i] ? fired : h_low[i];
      h_high[i] = possible[i] ? h_high[i] : silent;
    }
  }

  SJR_TARGET_INLINE void copy(const double* from, double* to) const {
    SJR_APART
    for (int i = 0; i < n; ++i)
      to[i] = from[i];
  }

  // Cuts low and high by what a step k - 1 without a spike, whose bounds are given, leaves at t.
  SJR_TARGET_INLINE void since(int64_t t,
                               int64_t k,
                               const double* before_low,
                               const double* before_high) {
    const double kept = job.powers[t - k + 1];
    const double rest = job.rest;
    const double top = job.above;
    const double* sums_low = row(job.sums_low, slots.row(job.T, t, k));
    const double* sums_high = row(job.sums_high, slots.row(job.T, t, k));
    SJR_APART
    for (int i = 0; i < n; ++i) {
      const double silent = smaller(before_high[i], top) - rest;
      const double most = ((kept * silent + sums_high[i]) + rest) + drift[i];
      high[i] = smaller(high[i], most);
    }
    if (!before_low)
      return;
    SJR_APART
    for (int i = 0; i < n; ++i) {
      const double least = ((kept * (before_low[i] - rest) + sums_low[i]) + rest) - drift[i];
      low[i] = larger(low[i], least);
    }
  }

  SJR_TARGET_INLINE void charge_slot(int64_t t, int64_t slot) {
    const int64_t start = slots.start(t, slot);
    copy(h_low, low);
    copy(h_high, high);
    if (start >= 0) {
      const double* sums_low = row(job.sums_low, slots.row(job.T, t, start));
      const double* sums_high = row(job.sums_high, slots.row(job.T, t, start));
      SJR_APART
      for (int i = 0; i < n; ++i) {
        const double least = (sums_low[i] + job.rest) - drift[i];
        const double most = (sums_high[i] + job.rest) + drift[i];
        low[i] = larger(low[i], least);
        high[i] = smaller(high[i], most);
      }
    }
    for (int64_t k = slots.earliest(t); k <= t; ++k) {
      if (start >= 0) {
        if (k > start)
          since(t, k, nullptr, past_high(k - 1, slots.slot(k - 1, start)));
        continue;
      }
      if (k < t)
        continue;
      alignas(64) double before_low[B], before_high[B];
      const int64_t members = slots.slot(t - 1, t - job.kept);
      copy(past_low(t - 1, 1), before_low);
      copy(past_high(t - 1, 1), before_high);
      for (int64_t member = 2; member <= members; ++member) {
        const double* also_low = past_low(t - 1, member);
        const double* also_high = past_high(t - 1, member);
        SJR_APART
        for (int i = 0; i < n; ++i) {
          before_low[i] = smaller(before_low[i], also_low[i]);
          before_high[i] = larger(before_high[i], also_high[i]);
        }
      }
      since(t, k, before_low, before_high);
    }
    copy(low, past_low(t, slot));
    copy(high, past_high(t, slot));
  }

  SJR_TARGET_INLINE void decide(int64_t t) {
    const double size_of_gain = magnitude_of(job.gains[t]);
    const double infinity = __builtin_inf();
    const double* of_current = row(job.error, t);
    alignas(64) int64_t all_sure[B], any_possible[B];
    SJR_APART
    for (int i = 0; i < n; ++i) {
      drift[i] = (job.decay * drift[i] + size_of_gain * of_current[i]) + error[i];
      any_low[i] = infinity;
      any_high[i] = -infinity;
      all_sure[i] = 1;
      any_possible[i] = 0;
      sure_bits[i] = possible_bits[i] = later[i] = 0;
    }
    for (int64_t slot = 0; slot < slots.count(t); ++slot) {
      charge_slot(t, slot);
      fires(t, low, high);
      const int64_t after = slots.after(t, slot);
      SJR_APART
      for (int i = 0; i < n; ++i) {
        const int64_t here = reached[i] >> slot & 1;
        any_low[i] = here ? smaller(any_low[i], low[i]) : any_low[i];
        any_high[i] = here ? larger(any_high[i], high[i]) : any_high[i];
        all_sure[i] &= sure[i] | (here ^ 1);
        any_possible[i] |= possible[i] & here;
        sure_bits[i] |= sure[i] << slot;
        possible_bits[i] |= possible[i] << slot;
        later[i] |= (here & (sure[i] ^ 1)) << after;
      }
    }
    const int64_t fresh = slots.count(t + 1) - 1;
    SJR_APART
    for (int i = 0; i < n; ++i) {
      sure[i] = all_sure[i];
      possible[i] = any_possible[i];
      reached[i] = later[i] | possible[i] << fresh;
    }
    clamp();
    int16_t* const sure_cases = job.sure_cases + t * job.M + first;
    int16_t* const possible_cases = job.possible_cases + t * job.M + first;
    SJR_APART
    for (int i = 0; i < n; ++i) {
      h_low[i] = larger(h_low[i], any_low[i]);
      h_high[i] = smaller(h_high[i], any_high[i]);
      sure_cases[i] = int16_t(sure_bits[i]);
      possible_cases[i] = int16_t(possible_bits[i]);
    }
  }

  SJR_TARGET_INLINE void reset(int64_t t) {
    const double rest = job.rest;
    const double top = larger(job.above, rest);
    const double threshold = magnitude_of(job.threshold);
    const double size_of_rest = magnitude_of(rest);
    double* out_h_low = row(job.h_low, t);
    double* out_h_high = row(job.h_high, t);
    double* out_sure = row(job.sure, t);
    double* out_possible = row(job.possible, t);
    double* out_v_low = row(job.v_low, t);
    double* out_v_high = row(job.v_high, t);
    SJR_APART
    for (int i = 0; i < n; ++i) {
      const double is_sure = double(sure[i]);
      const double is_possible = double(possible[i]);
      const double raised = h_low[i] > rest ? is_possible : 0.0;
      const double lowered = larger(is_sure, raised);
      double least = h_low[i] * (1 - lowered);
      double most = h_high[i] * (1 - is_possible) + top * (is_possible - is_sure);
      if (rest != 0) {
        least = least + rest * lowered;
        most = most + rest * is_sure;
      }
      const double size = larger(magnitude_of(h_low[i]), magnitude_of(h_high[i]));
      const double rounded = job.reset_unit * ((size + size_of_rest) + threshold) + job.reset_least;
      drift[i] = drift[i] + rounded;
      v_low[i] = least - rounded;
      v_high[i] = most + rounded;
      out_h_low[i] = h_low[i];
      out_h_high[i] = h_high[i];
      out_sure[i] = is_sure;
      out_possible[i] = is_possible;
      out_v_low[i] = v_low[i];
      out_v_high[i] = v_high[i];
    }
  }

  SJR_TARGET_INLINE void run() {
    SJR_APART
    for (int i = 0; i < n; ++i) {
      v_low[i] = v_high[i] = job.rest;
      drift[i] = 0;
      reached[i] = 1;
    }
    for (int64_t t = 0; t < job.T; ++t) {
      charge(t);
      if (job.windowed) {
        decide(t);
      } else {
        fires(t, h_low, h_high);
        clamp();
      }
      reset(t);
    }
  }
};

void bounded_steps(const StepsJob& job, int64_t first, int64_t last, double* memory, double*) {
  for (; first < last; first += B) {
    StepsBlock block(job, first, int(last - first < B ? last - first : B), memory);
    block.run();
  }
}

// Least and largest sums of one neuron over paths through its cases, for all weights at once; see
// path_sums.
SJR_INLINE void over_paths(
    const SumsJob& job, int64_t place, double* memory, double* least, double* most) {
  const Slots slots{job.kept};
  const int64_t F = job.F;
  double* const low = memory;  // [MAX_SLOTS, F], of what is still to come
  double* const high = low + MAX_SLOTS * F;
  double* const fire_low = high + MAX_SLOTS * F;
  double* const fire_high = fire_low + F;
  std::memset(low, 0, size_t(2 * MAX_SLOTS * F) * sizeof(double));
  for (int64_t t = job.T - 1; t >= 0; --t) {
    const int64_t fresh = slots.count(t + 1) - 1;
    const double* w = job.weights + t * F;
    SJR_APART
    for (int64_t f = 0; f < F; ++f) {
      fire_low[f] = w[f] + low[fresh * F + f];
      fire_high[f] = w[f] + high[fresh * F + f];
    }
    const int sure = uint16_t(job.sure_cases[t * job.O + place]);
    const int possible = uint16_t(job.possible_cases[t * job.O + place]);
    // from the last one on: what a slot reads lies in no later place
    for (int64_t slot = slots.count(t) - 1; slot >= 0; --slot) {
      const int64_t after = slots.after(t, slot);
      const double* stay_low = low + after * F;
      const double* stay_high = high + after * F;
      double* here_low = low + slot * F;
      double* here_high = high + slot * F;
      if (!(possible >> slot & 1)) {
        if (after == slot)
          continue;
        std::memcpy(here_low, stay_low, size_t(F) * sizeof(double));
        std::memcpy(here_high, stay_high, size_t(F) * sizeof(double));
      } else if (sure >> slot & 1) {
        std::memcpy(here_low, fire_low, size_t(F) * sizeof(double));
        std::memcpy(here_high, fire_high, size_t(F) * sizeof(double));
      } else {
        SJR_APART
        for (int64_t f = 0; f < F; ++f) {
          here_low[f] = smaller(fire_low[f], stay_low[f]);
          here_high[f] = larger(fire_high[f], stay_high[f]);
        }
      }
    }
  }
  SJR_APART
  for (int64_t f = 0; f < job.asked; ++f) {
    least[f * B] = low[f];
    most[f * B] = high[f];
  }
}

// The same over the trains first..last of a constant current, cut off by the spikes of single
// steps.
SJR_INLINE void over_chain(
    const SumsJob& job, int64_t neuron, double* memory, double* least, double* most) {
  const int64_t F = job.F;
  const int64_t first = job.first[neuron];
  const int64_t last = job.last[neuron];
  double* const apart_low = memory;
  double* const apart_high = memory + F;
  SJR_APART
  for (int64_t f = 0; f < F; ++f)
    apart_low[f] = apart_high[f] = 0;
  for (int64_t t = 0; t < job.T; ++t) {
    const double* w = job.weights + t * F;
    const bool sure = job.sure[t * job.M + neuron] > 0;
    const bool possible = job.possible[t * job.M + neuron] > 0;
    if (sure) {
      SJR_APART
      for (int64_t f = 0; f < F; ++f) {
        apart_low[f] += w[f];
        apart_high[f] += w[f];
      }
    } else if (possible) {
      SJR_APART
      for (int64_t f = 0; f < F; ++f) {
        apart_low[f] += smaller(w[f], 0);
        apart_high[f] += larger(w[f], 0);
      }
    }
  }
  int64_t level = 0;
  while (last - first + 1 >= int64_t(2) << level)
    ++level;
  const int64_t second = last + 1 - (int64_t(1) << level);
  const int64_t start = level * job.trains;
  const double* least_of_one = job.least + (start + first) * F;
  const double* least_of_other = job.least + (start + second) * F;
  const double* most_of_one = job.most + (start + first) * F;
  const double* most_of_other = job.most + (start + second) * F;
  SJR_APART
  for (int64_t f = 0; f < job.asked; ++f) {
    least[f * B] = larger(smaller(least_of_one[f], least_of_other[f]), apart_low[f]);
    most[f * B] = smaller(larger(most_of_one[f], most_of_other[f]), apart_high[f]);
  }
}

void train_sums(const SumsJob& job, int64_t first, int64_t last, double* memory, double*) {
  double* const low = memory;  // [asked, B]
  double* const high = low + job.F * B;
  double* const rest = high + job.F * B;
  for (; first < last; first += B) {
    const int n = int(last - first < B ? last - first : B);
    for (int64_t f = 0; f < job.asked; ++f) {
      double* to = low + f * B;
      double* also = high + f * B;
      SJR_APART
      for (int i = 0; i < B; ++i)
        to[i] = 0;
      for (int64_t t = 0; t < job.T; ++t) {
        const double w = job.weights[t * job.F + f];
        const double* sure = job.sure + t * job.M + first;
        if (w == 0)
          continue;
        SJR_APART
        for (int i = 0; i < n; ++i)
          to[i] += w * sure[i];
      }
      SJR_APART
      for (int i = 0; i < B; ++i)
        also[i] = to[i];
    }
    SJR_APART
    for (int i = 0; i < n; ++i) {
      const int64_t place = job.place[first + i];
      if (place < 0)
        continue;
      if (job.chained)
        over_chain(job, first + i, rest, low + i, high + i);
      else
        over_paths(job, place, rest, low + i, high + i);
    }
    for (int64_t f = 0; f < job.asked; ++f) {
      const double* from = low + f * B;
      const double* to = high + f * B;
      if (!job.narrow) {
        double* out_low = static_cast<double*>(job.low) + f * job.M + first;
        double* out_high = static_cast<double*>(job.high) + f * job.M + first;
        SJR_APART
        for (int i = 0; i < n; ++i) {
          out_low[i] = from[i];
          out_high[i] = to[i];
        }
        continue;
      }
      float* centre = static_cast<float*>(job.low) + f * job.M + first;
      float* radius = static_cast<float*>(job.high) + f * job.M + first;
      SJR_APART
      for (int i = 0; i < n; ++i) {
        const double middle = (from[i] + to[i]) / 2;
        const double half = job.slack * ((to[i] - from[i]) / 2);
        centre[i] = float(middle);
        const double lost = magnitude_of(middle - double(centre[i]));
        radius[i] = float(job.slack * (half + lost));
      }
    }
  }
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
