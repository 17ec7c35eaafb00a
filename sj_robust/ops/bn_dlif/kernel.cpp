// Compiled batch norm and DLIF in one pass, beside dlif/kernel.cpp in the same library. Training
// needs the statistics first (one read of x), and backward twice: once for the sums over a channel,
// once for the gradient of x.
#include "../dlif/job.h"

#define SJR_BODY "../bn_dlif/normalised.h"
#include "../dlif/each_instruction_set.h"

namespace sjr {
namespace {

constexpr int64_t STATISTICS_UNITS = 64;

struct Statistics {
  const Job& job;
  void (*add_samples)(const Job& job, int64_t first, int64_t last, double* sums);
  int64_t samples;
  double* sums;  // [STATISTICS_UNITS, 2, channels]

  static void unit(void* context, int, int64_t i) {
    const Statistics& me = *static_cast<Statistics*>(context);
    me.add_samples(me.job,
                   me.samples * i / STATISTICS_UNITS,
                   me.samples * (i + 1) / STATISTICS_UNITS,
                   me.sums + i * 2 * me.job.channels);
  }
};

}  // namespace
}  // namespace sjr

SJR_EXPORT int64_t sjr_bn_dlif_scratch_bytes(const sjr::Job* job) {
  const int64_t statistics = sjr::STATISTICS_UNITS * job->channels * 2 * int64_t(sizeof(double));
  return std::max(statistics, sjr::Plan(*job, SJR_CODE_OF(*job)).scratch_bytes());
}

// channel_sums [2, channels] = sums over x [T * N, channels, plane] of d and d^2, d = x - mean, for
// any mean near the true one: what the variance is made of without cancellation.
SJR_EXPORT void sjr_bn_statistics(const sjr::Job* job) {
  auto add_samples = sjr::baseline::add_samples;
#if defined(__x86_64__)
  if (job->instruction_set == sjr::AVX2) {
    add_samples = sjr::avx2::add_samples;
  }
  if (job->instruction_set == sjr::AVX512) {
    add_samples = sjr::avx512::add_samples;
  }
#endif
  const int64_t elements = job->T * job->M;
  const int64_t columns = 2 * job->channels;
  sjr::Statistics work{*job,
                       add_samples,
                       elements / (job->channels * job->plane),
                       static_cast<double*>(job->scratch)};
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

SJR_EXPORT void sjr_bn_dlif_forward(const sjr::Job* job) {
  sjr::Plan(*job, SJR_CODE_OF(*job)).forward();
}

SJR_EXPORT void sjr_bn_dlif_backward(const sjr::Job* job) {
  sjr::Plan(*job, SJR_CODE_OF(*job)).backward();
}
