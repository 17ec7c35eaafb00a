// What the compiled kernels ask of the machine: instruction set, threads, huge pages. Included once
// per source file.
#pragma once
#if !defined(__GNUC__)
#error \
    "the compiled kernels need the vector extensions of GCC or clang; without them the package uses plain torch"
#endif
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define SJR_EXPORT extern "C" __attribute__((visibility("default")))

namespace sjr {

enum InstructionSet { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

// Best instruction set that this processor and its operating system run.
inline int best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return AVX512;
  }
  if (__builtin_cpu_supports("avx2")) {
    return AVX2;
  }
#endif
  return BASELINE;
}

// Tensors from this size on are written past the cache: they would not stay in it until the next
// layer reads them.
constexpr int64_t STREAM_BYTES = int64_t(1) << 20;

// Asks for 2 MiB pages before the first touch; with 4 KiB pages the faults cost more than the
// arithmetic.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
  if (data && last > first) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)data, (void)bytes;
#endif
}

constexpr int MAX_THREADS = 256;
constexpr int64_t MIN_ELEMENTS_PER_THREAD =
    1 << 16;  // starting a thread costs about what 16 K elements cost

inline int thread_count(int requested, int64_t units, int64_t elements) {
  return int(std::max<int64_t>(
      1,
      std::min(
          {int64_t(requested), int64_t(MAX_THREADS), units, elements / MIN_ELEMENTS_PER_THREAD})));
}

// Runs task(context, thread, unit) for every unit. Each thread owns a contiguous share (two threads
// never fault the same huge page) and helps the others when its own is done, so that any number of
// threads finishes the work.
//
// The threads are those that torch's own operators run on, where its OpenMP library can be found
// among the loaded ones: they wait by spinning, so threads of our own would compete with them for
// the cores. GOMP_parallel is what GCC compiles
// "#pragma omp parallel" to; LLVM's and Intel's libraries have it as well. That pool does not
// survive a fork; a child, which says own_threads, and any process without such a library gets
// threads that live only as long as the call.
typedef void (*Task)(void* context, int thread, int64_t unit);

namespace detail {
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};
struct Team {
  Share share[MAX_THREADS];
  std::atomic<int> joined;
  int size;
  Task task;
  void* context;
};
inline void work(void* argument) {
  Team& team = *static_cast<Team*>(argument);
  const int index = team.joined.fetch_add(1, std::memory_order_relaxed);
  if (index >= team.size) {
    return;  // the pool may be larger than the work
  }
  for (int i = 0; i < team.size; ++i) {
    Share& share = team.share[(index + i) % team.size];
    for (int64_t unit; (unit = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      team.task(team.context, index, unit);
    }
  }
#if defined(__x86_64__)
  _mm_sfence();  // streaming stores are weakly ordered
#endif
}
inline void* work_of_thread(void* argument) {
  work(argument);
  return nullptr;
}

typedef void (*OpenMP)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);
inline OpenMP find_openmp() {
  return reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}
}  // namespace detail

inline void parallel(
    int64_t units, int threads, int pool, bool own_threads, Task task, void* context) {
  static const detail::OpenMP openmp = detail::find_openmp();
  detail::Team team;
  team.joined.store(0, std::memory_order_relaxed);
  team.size = threads;
  team.task = task;
  team.context = context;
  for (int i = 0; i < threads; ++i) {
    team.share[i].next.store(units * i / threads, std::memory_order_relaxed);
    team.share[i].end = units * (i + 1) / threads;
  }
  if (threads > 1 && openmp && !own_threads) {
    return openmp(detail::work, &team, unsigned(pool), 0);
  }
  pthread_t handles[MAX_THREADS];
  int started = 1;  // where the system refuses a thread, those that run do its share
  while (started < threads &&
         pthread_create(&handles[started], nullptr, detail::work_of_thread, &team) == 0) {
    ++started;
  }
  detail::work(&team);
  for (int i = 1; i < started; ++i) {
    pthread_join(handles[i], nullptr);
  }
}

}  // namespace sjr
