// Sums over trains for training, forward and backward, for one instruction set. What is computed
// stands in reference.py.
#include "../dlif/blocks.h"

namespace sjr {
namespace SJR_SET {
namespace {

constexpr int N = 64;  // neurons of a block

// Derivative of a spike by its potential above the threshold, of a block.
template <class C>
struct Slopes {
  Neuron<C> neuron;
  const C inverse;  // of the width
  const int kind;

  template <class AnyJob>
  static Job of(const AnyJob& from) {
    Job job{};
    job.alpha = from.alpha;
    job.surrogate = from.surrogate;
    return job;
  }

  template <class AnyJob>
  explicit Slopes(const AnyJob& job)
      : neuron(of(job)), inverse(C(1.0 / job.width)), kind(job.surrogate) {}

  template <int KIND>
  void run(const C* z, C* to, int n) const {
    for (int k = 0; k < n; k += LANES<C>)
      store(to + k, derivative<KIND>(load(z + k) * inverse, neuron) * inverse);
  }

  // z has room for whole vectors.
  void operator()(const C* z, C* to, int n) const {
    switch (kind) {
      case TRIANGLE:
        return run<TRIANGLE>(z, to, n);
      case ATAN:
        return run<ATAN>(z, to, n);
      case SIGMOID:
        return run<SIGMOID>(z, to, n);
      case EXPONENTIAL:
        return run<EXPONENTIAL>(z, to, n);
      case SOFT_SIGN:
      case SUPER_SPIKE:
        return run<SOFT_SIGN>(z, to, n);
      default:
        return run<ERF>(z, to, n);
    }
  }
};

// Sum in double, in eight parts.
template <class C>
SJR_INLINE double sum_of(const C* p, int n) {
  double parts[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k)
      parts[k] += double(p[i + k]);
  for (; i < n; ++i)
    parts[0] += double(p[i]);
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
         ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

template <class C>
SJR_INLINE C least_of(C a, C b) {
  return b < a ? b : a;
}
template <class C>
SJR_INLINE C most_of(C a, C b) {
  return a < b ? b : a;
}

// Share of a gradient that the lower of two values takes: all, half of it where they are equal, or
// none.
template <class C>
SJR_INLINE C share_of_lower(C a, C b) {
  const C of_higher = a == b ? C(0.5) : C(0);
  return a < b ? C(1) : of_higher;
}

// A block of neurons; `memory` holds parts [T + 1, slots, N].
template <class C>
struct JointBlock {
  const JointJob& job;
  const Slots slots;
  const Slopes<C>& slopes;
  const int64_t first;
  const int n;
  C* const memory;
  const C theta;
  const C* const powers;

  static constexpr int PARTS = 7;
  static int64_t width(const JointJob& job) { return Slots{job.kept}.count(job.T); }
  static int64_t part_size(const JointJob& job) { return (job.T + 1) * width(job) * N; }
  static int64_t scratch_elements(const JointJob& job) {
    return PARTS * part_size(job) + (2 * job.W + MAX_SLOTS + 4) * N;
  }

  C* part(int number, int64_t t, int64_t slot) const {
    return memory + number * part_size(job) + (t * width(job) + slot) * N;
  }
  C* low(int64_t t, int64_t slot) const { return part(0, t, slot); }
  C* high(int64_t t, int64_t slot) const { return part(1, t, slot); }
  C* sure(int64_t t, int64_t slot) const { return part(2, t, slot); }
  C* possible(int64_t t, int64_t slot) const { return part(3, t, slot); }
  C* rest(int64_t t, int64_t slot) const { return part(4, t, slot); }
  C* grad_low(int64_t t, int64_t slot) const { return part(5, t, slot); }
  C* grad_high(int64_t t, int64_t slot) const { return part(6, t, slot); }
  C* extra(int64_t number) const { return memory + PARTS * part_size(job) + number * N; }
  C* grad_sum_low(int64_t row) const { return extra(row); }
  C* grad_sum_high(int64_t row) const { return extra(job.W + row); }
  C* sequence(int64_t number) const { return extra(2 * job.W + number); }
  // The neurons of the block in a row of a tensor [rows, M].
  const C* in_row(const void* tensor, int64_t row) const {
    return static_cast<const C*>(tensor) + row * job.M + first;
  }
  C* in_row(void* tensor, int64_t row) const {
    return static_cast<C*>(tensor) + row * job.M + first;
  }
  const C* sum_low(int64_t t, int64_t start) const {
    return in_row(job.sums_low, slots.row(job.T, t, start));
  }
  const C* sum_high(int64_t t, int64_t start) const {
    return in_row(job.sums_high, slots.row(job.T, t, start));
  }
  C weight(int64_t f, int64_t t) const { return static_cast<const C*>(job.weights)[f * job.T + t]; }
  int64_t members(int64_t t) const { return slots.slot(t - 1, t - job.kept); }

  SJR_TARGET_INLINE void copy(const C* from, C* to) const {
    SJR_APART
    for (int i = 0; i < n; ++i)
      to[i] = from[i];
  }
  SJR_TARGET_INLINE void add(const C* from, C* to) const {
    SJR_APART
    for (int i = 0; i < n; ++i)
      to[i] += from[i];
  }
  SJR_TARGET_INLINE void lower(const C* a, const C* b, C* to) const {
    SJR_APART
    for (int i = 0; i < n; ++i)
      to[i] = least_of(a[i], b[i]);
  }

  // What the potential at k - 1, where there is no spike, leaves at t.
  SJR_TARGET_INLINE void since(int64_t t, int64_t k, const C* before, C* to) const {
    const C kept = powers[t - k + 1];
    const C* charge = sum_high(t, k);
    SJR_APART
    for (int i = 0; i < n; ++i)
      to[i] = kept * least_of(before[i], theta) + charge[i];
  }

  void charge_group(int64_t t) const {
    C* to_low = low(t, 1);
    C* to_high = high(t, 1);
    const C kept = powers[1];
    const C* charge = sum_low(t, t);
    C* before = sequence(0);
    copy(low(t - 1, 1), to_low);
    copy(high(t - 1, 1), before);
    if (members(t) > 1) {
      lower(to_low, low(t - 1, 2), to_low);
      const C* also = high(t - 1, 2);
      SJR_APART
      for (int i = 0; i < n; ++i)
        before[i] = most_of(before[i], also[i]);
    }
    SJR_APART
    for (int i = 0; i < n; ++i)
      to_low[i] = kept * to_low[i] + charge[i];
    since(t, t, before, to_high);
  }

  void charge() const {
    for (int64_t t = 0; t < job.T; ++t)
      for (int64_t slot = 0; slot < slots.count(t); ++slot) {
        const int64_t start = slots.start(t, slot);
        C* to_low = low(t, slot);
        C* to_high = high(t, slot);
        C* one = sequence(0);
        if (start < 0) {
          charge_group(t);
        } else {
          copy(sum_low(t, start), to_low);
          copy(sum_high(t, start), to_high);
          for (int64_t k = std::max(slots.earliest(t), start + 1); k <= t; ++k) {
            since(t, k, high(k - 1, slots.slot(k - 1, start)), one);
            lower(to_high, one, to_high);
          }
        }
        C* is_sure = sure(t, slot);
        C* is_possible = possible(t, slot);
        SJR_APART
        for (int i = 0; i < n; ++i) {
          is_sure[i] = to_low[i] - theta >= 0 ? C(1) : C(0);
          is_possible[i] = to_high[i] - theta >= 0 ? C(1) : C(0);
        }
      }
  }

  template <bool LEAST>
  SJR_TARGET_INLINE static C better(C a, C b) {
    return LEAST ? least_of(a, b) : most_of(a, b);
  }

  // rest(t, slot) of all steps for one row of weights.
  template <bool LEAST>
  SJR_TARGET_INLINE void over_paths(int64_t f) const {
    for (int64_t slot = 0; slot < slots.count(job.T); ++slot)
      std::memset(rest(job.T, slot), 0, N * sizeof(C));
    for (int64_t t = job.T - 1; t >= 0; --t) {
      const C w = weight(f, t);
      const C* fresh = rest(t + 1, slots.count(t + 1) - 1);
      for (int64_t slot = 0; slot < slots.count(t); ++slot) {
        const C* stay = rest(t + 1, slots.after(t, slot));
        const C* is_sure = sure(t, slot);
        const C* is_possible = possible(t, slot);
        C* to = rest(t, slot);
        SJR_APART
        for (int i = 0; i < n; ++i) {
          const C fire = w + fresh[i];
          const C best = better<LEAST>(fire, stay[i]);
          const C gained = is_possible[i] * (best - stay[i]);
          const C forced = is_sure[i] * (fire - best);
          to[i] = (stay[i] + gained) + forced;
        }
      }
    }
  }

  void forward() const {
    charge();
    for (int64_t f = 0; f < job.F; ++f) {
      over_paths<true>(f);
      copy(rest(0, 0), in_row(job.least, f));
      over_paths<false>(f);
      copy(rest(0, 0), in_row(job.most, f));
    }
  }

  // Adds the gradients of one row of sums to those of sure and possible, and of the weights.
  template <bool LEAST>
  void back_over_paths(int64_t f, const C* grad, double* totals) const {
    over_paths<LEAST>(f);
    alignas(64) C parts[2][MAX_SLOTS * N];
    C* here = parts[0];
    C* next = parts[1];
    copy(grad, here);
    for (int64_t t = 0; t < job.T; ++t) {
      const int64_t fresh = slots.count(t + 1) - 1;
      std::memset(next, 0, size_t((fresh + 1) * N) * sizeof(C));
      const C w = weight(f, t);
      const C* of_fresh = rest(t + 1, fresh);
      C* next_fresh = next + fresh * N;
      for (int64_t slot = 0; slot < slots.count(t); ++slot) {
        const int64_t after = slots.after(t, slot);
        const C* stay = rest(t + 1, after);
        const C* is_sure = sure(t, slot);
        const C* is_possible = possible(t, slot);
        const C* g = here + slot * N;
        C* d_sure = grad_low(t, slot);
        C* d_possible = grad_high(t, slot);
        C* next_stay = next + after * N;
        SJR_APART
        for (int i = 0; i < n; ++i) {
          const C fire = w + of_fresh[i];
          const C best = better<LEAST>(fire, stay[i]);
          d_possible[i] += g[i] * (best - stay[i]);
          d_sure[i] += g[i] * (fire - best);
          const C through_best = g[i] * is_possible[i] - g[i] * is_sure[i];
          const C of_fire = best == fire ? C(1) : C(0);
          const C share = fire == stay[i] ? C(0.5) : of_fire;
          next_stay[i] += (g[i] - g[i] * is_possible[i]) + (C(1) - share) * through_best;
          next_fresh[i] += g[i] * is_sure[i] + share * through_best;
        }
      }
      totals[f * job.T + t] += sum_of(next_fresh, n);
      std::swap(here, next);
    }
  }

  // Gradient of a potential bounded by earlier steps, which is that of its sums and of these.
  void back_over_charges(double* totals) const {
    double* const of_powers = totals + job.F * job.T;
    for (int64_t t = job.T - 1; t >= 0; --t)
      for (int64_t slot = slots.count(t) - 1; slot >= 0; --slot) {
        const int64_t start = slots.start(t, slot);
        if (start < 0)
          back_over_group(t, of_powers);
        else
          back_over_window(t, start, grad_low(t, slot), grad_high(t, slot), of_powers);
      }
  }

  void back_over_window(int64_t t, int64_t start, C* d_low, C* d_high, double* of_powers) const {
    const int64_t row = slots.row(job.T, t, start);
    add(d_low, grad_sum_low(row));
    // the largest potential after each of the earlier steps that lower it
    const int64_t earliest = std::max(slots.earliest(t), start + 1);
    copy(sum_high(t, start), sequence(0));
    for (int64_t k = earliest; k <= t; ++k) {
      const C* so_far = sequence(k - earliest);
      C* to = sequence(k - earliest + 1);
      since(t, k, high(k - 1, slots.slot(k - 1, start)), to);
      lower(so_far, to, to);
    }
    alignas(64) C before[N], d_before[N];
    for (int64_t k = t; k >= earliest; --k) {
      const int64_t earlier = slots.slot(k - 1, start);
      const C* so_far = sequence(k - earliest);
      const C* source = high(k - 1, earlier);
      const C kept = powers[t - k + 1];
      const C* charge = sum_high(t, k);
      C* to = grad_sum_high(slots.row(job.T, t, k));
      SJR_APART
      for (int i = 0; i < n; ++i) {
        const C silent = least_of(source[i], theta);
        const C found = kept * silent + charge[i];
        const C share = share_of_lower(found, so_far[i]);
        const C d = share * d_high[i];
        d_high[i] = d_high[i] - d;
        to[i] += d;
        before[i] = d * silent;
        d_before[i] = source[i] <= theta ? d * kept : C(0);
      }
      add(d_before, grad_high(k - 1, earlier));
      of_powers[t - k + 1] += sum_of(before, n);
    }
    add(d_high, grad_sum_high(row));
  }

  void back_over_group(int64_t t, double* of_powers) const {
    const C kept = powers[1];
    const bool two = members(t) > 1;
    C* d_low = grad_low(t, 1);
    C* d_high = grad_high(t, 1);
    C* to_low = grad_sum_low(t);
    C* to_high = grad_sum_high(t);
    const C* low_1 = low(t - 1, 1);
    const C* low_2 = low(t - 1, two ? 2 : 1);
    const C* high_1 = high(t - 1, 1);
    const C* high_2 = high(t - 1, two ? 2 : 1);
    C* d_low_1 = grad_low(t - 1, 1);
    C* d_low_2 = grad_low(t - 1, 2);
    C* d_high_1 = grad_high(t - 1, 1);
    C* d_high_2 = grad_high(t - 1, 2);
    double total = 0;
    SJR_APART
    for (int i = 0; i < n; ++i) {
      to_low[i] += d_low[i];
      to_high[i] += d_high[i];
      const C least = least_of(low_1[i], low_2[i]);
      const C most = most_of(high_1[i], high_2[i]);
      total += double(d_low[i] * least) + double(d_high[i] * least_of(most, theta));
      const C below = kept * d_low[i];
      const C above = most <= theta ? kept * d_high[i] : C(0);
      const C of_low = two ? share_of_lower(low_1[i], low_2[i]) : C(1);
      const C of_high = two ? share_of_lower(high_2[i], high_1[i]) : C(1);
      d_low_1[i] += of_low * below;
      d_high_1[i] += of_high * above;
      if (two) {
        d_low_2[i] += (C(1) - of_low) * below;
        d_high_2[i] += (C(1) - of_high) * above;
      }
    }
    of_powers[1] += total;
  }

  // Multiplies gradients of spikes by their derivatives by the potentials.
  void through_spike(const C* potential, C* grad) const {
    alignas(64) C z[N] = {};
    alignas(64) C slope[N];
    SJR_APART
    for (int i = 0; i < n; ++i)
      z[i] = potential[i] - theta;
    slopes(z, slope, n);
    SJR_APART
    for (int i = 0; i < n; ++i)
      grad[i] *= slope[i];
  }

  void backward(double* totals) const {
    charge();
    std::memset(grad_low(0, 0), 0, size_t(2 * part_size(job)) * sizeof(C));
    std::memset(extra(0), 0, size_t(2 * job.W * N) * sizeof(C));
    for (int64_t f = 0; f < job.F; ++f) {
      back_over_paths<true>(f, in_row(job.grad_least, f), totals);
      back_over_paths<false>(f, in_row(job.grad_most, f), totals);
    }
    for (int64_t t = 0; t < job.T; ++t)
      for (int64_t slot = 0; slot < slots.count(t); ++slot) {
        through_spike(low(t, slot), grad_low(t, slot));
        through_spike(high(t, slot), grad_high(t, slot));
      }
    back_over_charges(totals);
    for (int64_t row = 0; row < job.W; ++row) {
      copy(grad_sum_low(row), in_row(job.grad_low, row));
      copy(grad_sum_high(row), in_row(job.grad_high, row));
    }
  }
};

template <class C>
void joint_range(const JointJob& job, int64_t first, int64_t last, double* memory, double* totals) {
  const Slopes<C> slopes(job);
  for (; first < last; first += N) {
    const JointBlock<C> block{job,
                              Slots{job.kept},
                              slopes,
                              first,
                              int(std::min<int64_t>(N, last - first)),
                              reinterpret_cast<C*>(memory),
                              C(job.threshold),
                              static_cast<const C*>(job.powers)};
    if (job.grad_low)
      block.backward(totals);
    else
      block.forward();
  }
}

void joint_sums(const JointJob& job, int64_t first, int64_t last, double* memory, double* totals) {
  if (job.doubles)
    joint_range<double>(job, first, last, memory, totals);
  else
    joint_range<float>(job, first, last, memory, totals);
}

int64_t joint_scratch(const JointJob& job) {
  return JointBlock<double>::scratch_elements(job);
}

template <class C>
void chain_forward(const ChainJob& job, int64_t first, int64_t last, C* memory) {
  const int64_t F = job.F;
  const C* const tables[2] = {static_cast<const C*>(job.least), static_cast<const C*>(job.most)};
  C* const outputs[2] = {static_cast<C*>(job.least_sums), static_cast<C*>(job.most_sums)};
  for (; first < last; first += N) {
    const int n = int(std::min<int64_t>(N, last - first));
    for (int end = 0; end < 2; ++end) {
      SJR_APART
      for (int i = 0; i < n; ++i) {
        const C* from = tables[end] + (job.first[first + i] * job.J + job.last[first + i]) * F;
        SJR_APART
        for (int64_t f = 0; f < F; ++f)
          memory[f * N + i] = from[f];
      }
      SJR_APART
      for (int64_t f = 0; f < F; ++f)
        std::memcpy(outputs[end] + f * job.M + first, memory + f * N, size_t(n) * sizeof(C));
    }
  }
}

// Sum of products of S values, a multiple of eight.
template <class C>
SJR_INLINE C sum_of_products(const C* a, const C* b, int64_t S) {
  C parts[8] = {};
  for (int64_t s = 0; s < S; s += 8)
    for (int k = 0; k < 8; ++k)
      parts[k] += a[s + k] * b[s + k];
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
         ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// Gradients through the gates at one end of the currents of n neurons, whose sums have the
// gradients `grads` [n, S]; `table` has rows [G, S] by the trains `ends`. Far from its gate a
// current has no derivative with many surrogates, and nothing to add.
template <class C>
SJR_INLINE void through_gates(const ChainJob& job,
                              const Slopes<C>& slopes,
                              const C* table,
                              const int64_t* ends,
                              const C* currents,
                              const C* grads,
                              int n,
                              C* to,
                              double* totals) {
  const int64_t G = job.G;
  const int64_t S = job.S;
  const C* scale = static_cast<const C*>(job.scale);
  const C* shift = static_cast<const C*>(job.shift);
  alignas(64) C z[N] = {};
  alignas(64) C slope[N];
  alignas(64) C found[N] = {};
  int some[N];
  for (int64_t g = 0; g < G; ++g) {
    SJR_APART
    for (int i = 0; i < n; ++i)
      z[i] = shift[g] + scale[g] * currents[i];
    slopes(z, slope, n);
    int count = 0;
    for (int i = 0; i < n; ++i) {
      some[count] = i;
      count += slope[i] != 0;
    }
    C of_scale = 0;
    C of_shift = 0;
    for (int k = 0; k < count; ++k) {
      const int i = some[k];
      const C opened = sum_of_products(grads + i * S, table + (ends[i] * G + g) * S, S);
      const C change = opened * slope[i];
      found[i] += scale[g] * change;
      of_scale += change * currents[i];
      of_shift += change;
    }
    totals[g] += double(of_scale);
    totals[G + g] += double(of_shift);
  }
  SJR_APART
  for (int i = 0; i < n; ++i)
    to[i] = found[i];
}

// Adds the gradients of the sums of a chain to those of the trains that have its least and its
// largest values.
template <class C>
SJR_INLINE void to_values(const ChainJob& job, int64_t chain, const C* grads, double* totals) {
  const int64_t F = job.F;
  const int32_t* least_at = job.least_at + chain * F;
  const int32_t* most_at = job.most_at + chain * F;
  for (int64_t f = 0; f < F; ++f) {
    const double first = double(grads[f]);
    const double second = double(grads[F + f]);
    totals[f * job.J + least_at[f]] += job.centred ? (first - second) / 2 : first;
    totals[f * job.J + most_at[f]] += job.centred ? (first + second) / 2 : second;
  }
}

template <class C>
void chain_backward(const ChainJob& job, int64_t first, int64_t last, C* grads, double* totals) {
  const Slopes<C> slopes(job);
  const int64_t F = job.F;
  const int64_t S = job.S;
  std::memset(grads, 0, size_t(S * N) * sizeof(C));  // what lies beyond 2 F stays zero
  for (; first < last; first += N) {
    const int n = int(std::min<int64_t>(N, last - first));
    for (int64_t f = 0; f < F; ++f) {
      const C* least = static_cast<const C*>(job.grad_least) + f * job.M + first;
      const C* most = static_cast<const C*>(job.grad_most) + f * job.M + first;
      SJR_APART
      for (int i = 0; i < n; ++i) {
        grads[i * S + f] = least[i];
        grads[i * S + F + f] = most[i];
      }
    }
    if (job.least_at)
      for (int i = 0; i < n; ++i)
        to_values<C>(job,
                     job.first[first + i] * job.J + job.last[first + i],
                     grads + i * S,
                     totals + 2 * job.G);
    const C* const tables[2] = {static_cast<const C*>(job.to_last),
                                static_cast<const C*>(job.from_first)};
    const int64_t* const ends[2] = {job.last + first, job.first + first};
    const C* const currents[2] = {static_cast<const C*>(job.low) + first,
                                  static_cast<const C*>(job.high) + first};
    C* const found[2] = {static_cast<C*>(job.grad_low) + first,
                         static_cast<C*>(job.grad_high) + first};
    for (int end = 0; end < 2; ++end)
      through_gates<C>(
          job, slopes, tables[end], ends[end], currents[end], grads, n, found[end], totals);
  }
}

void chain_sums(const ChainJob& job, int64_t first, int64_t last, double* memory, double* totals) {
  if (job.doubles) {
    if (job.grad_low)
      chain_backward<double>(job, first, last, memory, totals);
    else
      chain_forward<double>(job, first, last, memory);
  } else if (job.grad_low) {
    chain_backward<float>(job, first, last, reinterpret_cast<float*>(memory), totals);
  } else {
    chain_forward<float>(job, first, last, reinterpret_cast<float*>(memory));
  }
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
