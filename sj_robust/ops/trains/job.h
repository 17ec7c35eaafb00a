// What the calls of this operator are about; mirrored by cpp.py. Sequences are [T, M], rows of
// consecutive neurons.
#pragma once
#include "../dlif/runtime.h"

namespace sjr {

// Slots of a step, see Windows in config.py.
struct Slots {
  int64_t kept;
  int64_t count(int64_t t) const { return std::min(t, kept + 1) + 1; }
  int64_t start(int64_t t, int64_t slot) const {  // -1 for the slot that holds several
    if (slot == 0 || t <= kept)
      return slot;
    return slot == 1 ? -1 : t - kept - 1 + slot;
  }
  int64_t slot(int64_t t, int64_t start) const {
    if (start == 0 || t <= kept)
      return start;
    return std::max<int64_t>(1, start - t + kept + 1);
  }
  int64_t after(int64_t t, int64_t slot) const { return t <= kept || slot < 2 ? slot : slot - 1; }
  int64_t earliest(int64_t t) const {
    return std::max<int64_t>(1, t - kept + 1);
  }  // of the latest windows
  int64_t row(int64_t T,
              int64_t t,
              int64_t start) const {  // of the sums of a window, in all T steps
    if (start == t)
      return t;
    const int64_t few = std::min(t, kept + 1);  // steps of which every window has sums
    const int64_t before = few * (few - 1) / 2 + (t - few) * kept;
    return T + before + (start == 0 ? 0 : start - earliest(t) + 1);
  }
};

constexpr int64_t MAX_SLOTS = 16;  // bits of a case

// Sums over trains for training, in the type of `doubles`; M neurons, rows of M.
struct JointJob {
  int64_t T, F, M, kept, W;
  double threshold, alpha, width;
  int32_t instruction_set, threads, own_threads, surrogate, doubles, unused;
  const void *sums_low, *sums_high;    // [W, M]
  const void *weights, *powers;        // [F, T], [T + 1]
  void *least, *most;                  // [F, M], written by the forward pass
  const void *grad_least, *grad_most;  // [F, M], read by the backward pass
  void *grad_low, *grad_high;          // [W, M], written by it
  double* totals;                      // [F * T + T + 1]: gradients of weights and powers
  void* scratch;
};

// The same over the trains first..last of a constant current, and the gates between them; see
// ChainSums.
struct ChainJob {
  int64_t F, M, J, G, S;  // S is 2 F, padded to a multiple of eight
  double alpha, width;
  int32_t instruction_set, threads, own_threads, surrogate, doubles, centred;
  const int64_t *first, *last;         // [M]
  const void *least, *most;            // [J, J, F]: of trains a..b
  void *least_sums, *most_sums;        // [F, M], written by the forward pass
  const void *low, *high;              // [M], currents
  const void *grad_least, *grad_most;  // [F, M], read by the backward pass
  const void *to_last, *from_first;    // [J, G, S]: what a gate at the lower end changes, by last
                                       // train; and the other one; padded with zeros
  const void *scale, *shift;           // [G]
  const int32_t *least_at, *most_at;   // [J, J, F]: trains with these values, if their gradient is
                                       // asked for; `centred`: sums are centres and radii
  void *grad_low, *grad_high;          // [M]
  double* totals;                      // [2 G + F * J]: gradients of scale, shift and values
  void* scratch;
};

}  // namespace sjr
