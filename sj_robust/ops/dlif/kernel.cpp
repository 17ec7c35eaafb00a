// Compiled DLIF for the CPU behind a plain C interface: knows neither Python nor torch, called with
// data pointers. What is computed stands in reference.py and blocks.h; which instruction set runs
// it is chosen at run time.
#include "job.h"

#define SJR_BODY "plain.h"
#include "each_instruction_set.h"

// Changes whenever Job or the meaning of a field does; cpp.py refuses any other.
SJR_EXPORT int sjr_interface() {
  return 8;
}

SJR_EXPORT int sjr_best_instruction_set() {
  return sjr::best_instruction_set();
}

// Bytes that `scratch` of this job must hold, aligned to 64.
SJR_EXPORT int64_t sjr_dlif_scratch_bytes(const sjr::Job* job) {
  return sjr::Plan(*job, SJR_CODE_OF(*job)).scratch_bytes();
}

SJR_EXPORT void sjr_dlif_forward(const sjr::Job* job) {
  sjr::Plan(*job, SJR_CODE_OF(*job)).forward();
}

SJR_EXPORT void sjr_dlif_backward(const sjr::Job* job) {
  sjr::Plan(*job, SJR_CODE_OF(*job)).backward();
}
