// Compiled sums over trains for training on the CPU, beside dlif/kernel.cpp in the same library.
#include "../dlif/job.h"
#include "job.h"

#define SJR_BODY "../trains/training.h"
#include "../dlif/each_instruction_set.h"

namespace sjr {
namespace {

constexpr int64_t UNIT_OF_NEURONS = 1024;

// A call, unit by unit: units depend on the shape alone, so that sums over them do not depend on
// the number of threads.
template <class AnyJob>
struct Work {
  const AnyJob& job;
  void (*run)(const AnyJob& job, int64_t first, int64_t last, double* memory, double* totals);
  int64_t doubles;  // of memory, by thread
  int64_t totals;   // sums over all neurons

  int64_t units() const { return (job.M + UNIT_OF_NEURONS - 1) / UNIT_OF_NEURONS; }
  int threads() const { return thread_count(job.threads, units(), job.M * doubles); }
  int64_t scratch_bytes() const {
    return (threads() * doubles + units() * totals) * int64_t(sizeof(double));
  }
  double* memory() const { return static_cast<double*>(job.scratch); }
  double* totals_of(int64_t unit) const { return memory() + threads() * doubles + unit * totals; }

  static void unit(void* context, int thread, int64_t i) {
    const Work& me = *static_cast<Work*>(context);
    const int64_t first = i * UNIT_OF_NEURONS;
    const int64_t last = std::min(me.job.M, first + UNIT_OF_NEURONS);
    me.run(me.job, first, last, me.memory() + thread * me.doubles, me.totals_of(i));
  }

  void start() {
    std::memset(totals_of(0), 0, size_t(units() * totals) * sizeof(double));
    parallel(units(), threads(), job.threads, job.own_threads, unit, this);
    for (int64_t i = 0; job.totals && i < totals; ++i) {
      job.totals[i] = 0;
      for (int64_t unit = 0; unit < units(); ++unit)
        job.totals[i] += totals_of(unit)[i];
    }
  }
};

int64_t rounded_up(int64_t doubles) {
  return (doubles + 7) / 8 * 8;
}

Work<JointJob> work(const JointJob& job) {
  return {job,
          SJR_OF_SET(job, joint_sums),
          rounded_up(baseline::joint_scratch(job)),
          job.F * job.T + job.T + 1};
}

Work<ChainJob> work(const ChainJob& job) {
  return {job,
          SJR_OF_SET(job, chain_sums),
          rounded_up(std::max(job.S, job.F) * baseline::N),
          2 * job.G + job.F * job.J};
}

}  // namespace
}  // namespace sjr

// Changes whenever a job or the meaning of a field does; cpp.py refuses any other.
SJR_EXPORT int sjr_trains_interface() {
  return 3;
}

// Bytes that `scratch` of a job must hold, and the call itself.
#define SJR_CALL(name, Job)                                       \
  SJR_EXPORT int64_t sjr_##name##_scratch_bytes(const Job* job) { \
    return sjr::work(*job).scratch_bytes();                       \
  }                                                               \
  SJR_EXPORT void sjr_##name(const Job* job) {                    \
    sjr::work(*job).start();                                      \
  }

SJR_CALL(joint_sums, sjr::JointJob)
SJR_CALL(chain_sums, sjr::ChainJob)
