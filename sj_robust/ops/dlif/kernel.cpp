// Compiled DLIF for the CPU behind a plain C interface: knows neither Python nor torch, called with data pointers.
// What is computed stands in reference.py and blocks.h; which instruction set runs it is chosen at run time.
#include <type_traits>

#include "runtime.h"

namespace sjr {

enum Storage { FLOAT32 = 0, FLOAT64 = 1, FLOAT16 = 2, BFLOAT16 = 3 };
enum Surrogate { TRIANGLE = 0, ATAN = 1, SIGMOID = 2 };
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Everything one call is about; mirrored by cpp.py. Sequences are [T, M], one step is [M], gain is [T].
// Potentials, gain and their gradients are in the arithmetic type: double for FLOAT64, float otherwise.
struct Job {
  int64_t T, M;
  double decay, leak_current, v_threshold, v_reset, alpha;
  int32_t soft_reset, detach_reset, surrogate, storage, instruction_set, threads;
  const void *x, *gain, *v_init;
  void *s, *v, *v_seq;              // written by the forward pass
  const void *gs, *gv, *gvs;        // read by the backward pass
  void *gx, *gain_grad, *gv_init;   // written by the backward pass
  void* scratch;
  int64_t stream;                   // set here
};

constexpr int64_t UNIT = 4096;    // neurons handed to a thread at once
constexpr int64_t FLUSH = 4096;   // neurons summed in the arithmetic type before their sum is added up in double
constexpr int64_t MAX_UNITS = 256;

}  // namespace sjr

#define SJR_BODY "blocks.h"
#include "each_instruction_set.h"

namespace sjr {
namespace {

struct Code {
  decltype(&baseline::forward) forward;
  decltype(&baseline::backward) backward;
  decltype(&baseline::scratch_bytes) scratch_bytes;
};

Code code_of([[maybe_unused]] const Job& job) {
#if defined(__x86_64__)
  if (job.instruction_set == AVX512) return {avx512::forward, avx512::backward, avx512::scratch_bytes};
  if (job.instruction_set == AVX2) return {avx2::forward, avx2::backward, avx2::scratch_bytes};
#endif
  return {baseline::forward, baseline::backward, baseline::scratch_bytes};
}

// Units depend on the shape alone, so that sums over them do not depend on the number of threads.
struct Plan {
  Job job;
  Code code;
  int64_t unit, units, thread_bytes;
  int threads;
  double* gain_partial;  // [units, T]
  char* memory;          // [threads, thread_bytes]

  explicit Plan(const Job& j) : job(j), code(code_of(j)) {
    unit = std::max(UNIT, ((job.M + MAX_UNITS - 1) / MAX_UNITS + UNIT - 1) / UNIT * UNIT);
    units = (job.M + unit - 1) / unit;
    threads = thread_count(job.threads, units, job.T * job.M);
    thread_bytes = (code.scratch_bytes(job) + 63) / 64 * 64;
    gain_partial = static_cast<double*>(job.scratch);
    memory = static_cast<char*>(job.scratch) + partial_bytes();
  }
  int64_t partial_bytes() const { return (units * job.T * int64_t(sizeof(double)) + 63) / 64 * 64; }
  int64_t element() const { return job.storage == FLOAT64 ? 8 : job.storage == FLOAT32 ? 4 : 2; }
  void prepare_output(void* data, int64_t element_bytes) {
    advise_huge_pages(data, job.T * job.M * element_bytes);
    job.stream = job.T * job.M * element_bytes >= STREAM_BYTES;
  }
};

void forward_unit(void* context, int thread, int64_t unit) {
  const Plan& plan = *static_cast<Plan*>(context);
  const int64_t first = unit * plan.unit, last = std::min(plan.job.M, first + plan.unit);
  plan.code.forward(plan.job, first, last, plan.memory + thread * plan.thread_bytes);
}

void backward_unit(void* context, int thread, int64_t unit) {
  const Plan& plan = *static_cast<Plan*>(context);
  const int64_t first = unit * plan.unit, last = std::min(plan.job.M, first + plan.unit);
  plan.code.backward(plan.job, first, last, plan.memory + thread * plan.thread_bytes, plan.gain_partial + unit * plan.job.T);
}

}  // namespace
}  // namespace sjr

// Changes whenever Job or the meaning of a field does; cpp.py refuses any other.
SJR_EXPORT int sjr_dlif_interface() { return 1; }

SJR_EXPORT int sjr_best_instruction_set() { return sjr::best_instruction_set(); }

// Bytes that `scratch` of this job must hold, aligned to 64.
SJR_EXPORT int64_t sjr_dlif_scratch_bytes(const sjr::Job* job) {
  const sjr::Plan plan(*job);
  return plan.partial_bytes() + plan.threads * plan.thread_bytes;
}

SJR_EXPORT void sjr_dlif_forward(const sjr::Job* job) {
  sjr::Plan plan(*job);
  if (plan.job.v_seq) plan.prepare_output(plan.job.v_seq, plan.job.storage == sjr::FLOAT64 ? 8 : 4);
  plan.prepare_output(plan.job.s, plan.element());
  sjr::parallel(plan.units, plan.threads, sjr::forward_unit, &plan);
}

SJR_EXPORT void sjr_dlif_backward(const sjr::Job* job) {
  sjr::Plan plan(*job);
  const int64_t T = plan.job.T;
  plan.prepare_output(plan.job.gx, plan.element());
  std::memset(plan.gain_partial, 0, size_t(plan.partial_bytes()));
  sjr::parallel(plan.units, plan.threads, sjr::backward_unit, &plan);
  for (int64_t t = 0; t < T; ++t) {
    double total = 0;
    for (int64_t unit = 0; unit < plan.units; ++unit) total += plan.gain_partial[unit * T + t];
    if (plan.job.storage == sjr::FLOAT64)
      static_cast<double*>(plan.job.gain_grad)[t] = total;
    else
      static_cast<float*>(plan.job.gain_grad)[t] = float(total);
  }
}
