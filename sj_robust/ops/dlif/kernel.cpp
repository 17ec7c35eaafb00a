// Compiled DLIF for the CPU, with batch norm before it and 2x2 average pooling behind it if they
// are asked for, behind a plain C interface: knows neither Python nor torch, called with data
// pointers. What is computed stands in reference.py and blocks.h; which instruction set runs it is
// chosen at run time. Training with a batch norm needs the statistics first (one read of x), and
// backward twice: once for the sums over a channel, once for the gradient of x.
#include "job.h"

#define SJR_BODY "layer.h"
#include "each_instruction_set.h"

namespace sjr {
namespace {

constexpr int64_t STATISTICS_UNITS = 64;

struct Statistics {
  const Job& job;
  int64_t samples;
  double* sums;  // [STATISTICS_UNITS, 2, channels]

  static void unit(void* context, int, int64_t i) {
    const Statistics& me = *static_cast<Statistics*>(context);
    SJR_OF_SET(me.job, layer)
        .add_samples(me.job,
                     me.samples * i / STATISTICS_UNITS,
                     me.samples * (i + 1) / STATISTICS_UNITS,
                     me.sums + i * 2 * me.job.channels);
  }
};

Plan plan(const Job& job) {
  return Plan(job, SJR_OF_SET(job, layer));
}

}  // namespace
}  // namespace sjr

// Changes whenever Job or the meaning of a field does; cpp.py refuses any other.
SJR_EXPORT int sjr_interface() {
  return 9;
}

SJR_EXPORT int sjr_best_instruction_set() {
  return sjr::best_instruction_set();
}

// Bytes that `scratch` of this job must hold, aligned to 64.
SJR_EXPORT int64_t sjr_scratch_bytes(const sjr::Job* job) {
  const int64_t statistics = sjr::STATISTICS_UNITS * job->channels * 2 * int64_t(sizeof(double));
  return std::max(statistics, sjr::plan(*job).scratch_bytes());
}

SJR_EXPORT void sjr_forward(const sjr::Job* job) {
  sjr::plan(*job).forward();
}

SJR_EXPORT void sjr_backward(const sjr::Job* job) {
  sjr::plan(*job).backward();
}

// channel_sums [2, channels] = sums over x [T * N, channels, plane] of d and d^2, d = x - mean, for
// any mean near the true one: what the variance is made of without cancellation.
SJR_EXPORT void sjr_statistics(const sjr::Job* job) {
  const int64_t elements = job->T * job->M;
  const int64_t columns = 2 * job->channels;
  const int64_t samples = elements / (job->channels * job->plane);
  sjr::Statistics work{*job, samples, static_cast<double*>(job->scratch)};
  std::memset(work.sums, 0, size_t(sjr::STATISTICS_UNITS * columns) * sizeof(double));
  const int threads = sjr::thread_count(job->threads, sjr::STATISTICS_UNITS, elements);
  sjr::parallel(sjr::STATISTICS_UNITS, threads, job->threads, job->own_threads, work.unit, &work);
  for (int64_t i = 0; i < columns; ++i) {
    job->channel_sums[i] = 0;
    for (int64_t unit = 0; unit < sjr::STATISTICS_UNITS; ++unit) {
      job->channel_sums[i] += work.sums[unit * columns + i];
    }
  }
}
