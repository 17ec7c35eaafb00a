// One call of a compiled kernel and how it is divided among threads. Included once per source file.
#pragma once
#include <type_traits>

#include "runtime.h"

namespace sjr {

enum Storage { FLOAT32 = 0, FLOAT64 = 1, FLOAT16 = 2, BFLOAT16 = 3 };
enum Surrogate {
  TRIANGLE,
  ATAN,
  SIGMOID,
  EXPONENTIAL,
  SOFT_SIGN,
  SUPER_SPIKE,
  ERF
};  // in the order of surrogate.py
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Everything one call is about; mirrored by cpp.py. Sequences are [T, M], one step is [M], gain is
// [T]. Potentials, gain and their gradients are in the arithmetic type: double for FLOAT64, float
// otherwise.
struct Job {
  int64_t T, M, x_stride;  // x_stride: M, or 0 where every step of x is the same one
  double decay, leak_current, v_threshold, v_reset,
      alpha;  // leak_current is 0 unless v_reset is another value
  int32_t soft_reset, detach_reset, surrogate, storage, instruction_set, threads, own_threads;
  const void *x, *gain, *v_init;
  void *s, *v, *v_seq;             // written by the forward pass
  const void *gs, *gv, *gvs;       // read by the backward pass
  void *gx, *gain_grad, *gv_init;  // written by the backward pass
  void* scratch;
  int64_t stream;  // set here
  // The step is [N, channels, plane], or [N, plane, channels] if channels_last; both 0 where
  // neither of the parts below needs them. A batch norm before the neuron, if scale is there: per
  // channel x becomes scale * x + offset, and gx is scale * g + slope * (x - mean) + constant. A
  // 2x2 average pooling behind it, if pool: the plane is [height, width], s and gs are those of its
  // output.
  int64_t channels, plane, height, width;
  int32_t channels_last, pool;
  const void *scale, *offset, *mean, *slope, *constant;
  double*
      channel_sums;  // [2, channels]: of g and of g * (x - mean); without it no gain_grad either
  // In the arithmetic type, if they are there: the neuron's current scale * x + offset, written by
  // the forward pass; a gradient that it gets from elsewhere; and, with channel_sums and without
  // gx, scale times the sum [M] of g over all steps.
  void* current;
  const void* g_current;
  void* g_total;
};

// Calls f with a value of the type that a call's sequences are stored in and one of its arithmetic
// type.
template <class F>
void with_types(const Job& job, const F& f) {
  switch (job.storage) {
    case FLOAT32:
      return f(float(), float());
    case FLOAT64:
      return f(double(), double());
    case FLOAT16:
      return f(Half(), float());
    default:
      return f(BFloat16(), float());
  }
}

// The items that units of work are made of: neurons, or what the pooling must not divide. That is a
// pair of rows of a plane, or channels last the channels of 2x2 pixels; the last one in a plane of
// odd size has one row or column.
struct Shape {
  int64_t rows, columns, items, item_neurons, pooled_M;
  explicit Shape(const Job& job)
      : rows(0), columns(0), items(job.M), item_neurons(1), pooled_M(job.M) {
    if (!job.pool) {
      return;
    }
    rows = (job.height + 1) / 2;
    columns = job.channels_last ? (job.width + 1) / 2 : 1;
    const int64_t planes =
        job.channels_last ? job.M / (job.plane * job.channels) : job.M / job.plane;
    items = planes * rows * columns;
    item_neurons = job.channels_last ? 4 * job.channels : 2 * job.width;
    pooled_M = job.M / job.plane * (job.height / 2) * (job.width / 2);
  }
};

constexpr int64_t UNIT = 4096;  // neurons handed to a thread at once
constexpr int64_t FLUSH =
    4096;  // neurons summed in the arithmetic type before their sum is added up in double
constexpr int64_t MAX_UNITS = 256;

struct Code {  // of one instruction set
  void (*forward)(const Job& job, int64_t first, int64_t last, void* memory);  // items of Shape
  void (*backward)(const Job& job,
                   int64_t first,
                   int64_t last,
                   void* memory,
                   double* gain_sums,
                   double* channel_sums);
  int64_t (*scratch_bytes)(const Job& job);
  void (*add_samples)(const Job& job, int64_t first, int64_t last, double* sums);
};

// Units depend on the shape alone, so that sums over them do not depend on the number of threads.
struct Plan {
  Job job;
  Code code;
  int64_t unit, units, sums_per_unit, thread_bytes;  // unit: items of each
  int threads;
  double* sums;  // [units, sums_per_unit]: T of the gain, 2 per channel
  char* memory;  // [threads, thread_bytes]

  int64_t items;

  Plan(const Job& j, Code c) : job(j), code(c) {
    const Shape shape(job);
    items = shape.items;
    const int64_t least = std::max<int64_t>(1, UNIT / shape.item_neurons);
    unit = std::max(least, ((items + MAX_UNITS - 1) / MAX_UNITS + least - 1) / least * least);
    units = (items + unit - 1) / unit;
    sums_per_unit = job.T + 2 * job.channels;
    threads = thread_count(job.threads, units, job.T * job.M);
    thread_bytes = (code.scratch_bytes(job) + 63) / 64 * 64;
    sums = static_cast<double*>(job.scratch);
    memory = static_cast<char*>(job.scratch) + sums_bytes();
  }

  int64_t sums_bytes() const {
    return (units * sums_per_unit * int64_t(sizeof(double)) + 63) / 64 * 64;
  }
  int64_t scratch_bytes() const { return sums_bytes() + threads * thread_bytes; }
  int64_t element_bytes() const {
    return job.storage == FLOAT64 ? 8 : job.storage == FLOAT32 ? 4 : 2;
  }

  void prepare_output(void* data, int64_t elements, int64_t element_bytes) {
    advise_huge_pages(data, job.T * elements * element_bytes);
    job.stream = job.T * elements * element_bytes >= STREAM_BYTES;
  }

  void forward() {
    for (void* sequence : {job.v_seq, job.current}) {
      if (sequence) {
        prepare_output(sequence, job.M, job.storage == FLOAT64 ? 8 : 4);
      }
    }
    prepare_output(job.s, Shape(job).pooled_M, element_bytes());
    parallel(units, threads, job.threads, job.own_threads, forward_unit, this);
  }

  void backward() {
    if (job.gx) {
      prepare_output(job.gx, job.M, element_bytes());
    }
    std::memset(sums, 0, size_t(sums_bytes()));
    parallel(units, threads, job.threads, job.own_threads, backward_unit, this);
    for (int64_t t = 0; job.gain_grad && t < job.T; ++t) {
      if (job.storage == FLOAT64) {
        static_cast<double*>(job.gain_grad)[t] = total(t);
      } else {
        static_cast<float*>(job.gain_grad)[t] = float(total(t));
      }
    }
    for (int64_t i = 0; job.channel_sums && i < 2 * job.channels; ++i) {
      job.channel_sums[i] = total(job.T + i);
    }
  }

 private:
  double total(int64_t column) const {
    double result = 0;
    for (int64_t i = 0; i < units; ++i) {
      result += sums[i * sums_per_unit + column];
    }
    return result;
  }

  static void forward_unit(void* context, int thread, int64_t i) {
    const Plan& plan = *static_cast<Plan*>(context);
    const int64_t first = i * plan.unit;
    const int64_t last = std::min(plan.items, first + plan.unit);
    plan.code.forward(plan.job, first, last, plan.memory + thread * plan.thread_bytes);
  }

  static void backward_unit(void* context, int thread, int64_t i) {
    const Plan& plan = *static_cast<Plan*>(context);
    const int64_t first = i * plan.unit;
    const int64_t last = std::min(plan.items, first + plan.unit);
    double* const sums = plan.sums + i * plan.sums_per_unit;
    plan.code.backward(
        plan.job, first, last, plan.memory + thread * plan.thread_bytes, sums, sums + plan.job.T);
  }
};

}  // namespace sjr
