// What the compiled kernels ask of the machine: instruction set, threads, huge pages. Included once per source file.
#pragma once
#if !defined(__GNUC__)
#error "the compiled kernels need the vector extensions of GCC or clang; without them the package uses plain torch"
#endif
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
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
  return BASELINE;
}

// Tensors from this size on are written past the cache: they would not stay in it until the next layer reads them.
constexpr int64_t STREAM_BYTES = int64_t(16) << 20;

// Asks for 2 MiB pages before the first touch; with 4 KiB pages the faults cost more than the arithmetic.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
  if (data && last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

constexpr int MAX_THREADS = 256;
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 16;  // starting a thread costs about what 16 K elements cost

inline int thread_count(int requested, int64_t units, int64_t elements) {
  return int(std::max<int64_t>(1, std::min({int64_t(requested), int64_t(MAX_THREADS), units, elements / MIN_ELEMENTS_PER_THREAD})));
}

// Runs task(context, thread, unit) for every unit. Threads live only as long as the call, so a fork between two calls
// finds nothing to inherit. Each owns a contiguous share (two threads never fault the same huge page) and helps the
// others when its own is done.
typedef void (*Task)(void* context, int thread, int64_t unit);

namespace detail {
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};
struct Team {
  Share share[MAX_THREADS];
  int size;
  Task task;
  void* context;
};
struct Member {
  Team* team;
  int index;
};
inline void* work(void* argument) {
  const Member& me = *static_cast<Member*>(argument);
  for (int i = 0; i < me.team->size; ++i) {
    Share& share = me.team->share[(me.index + i) % me.team->size];
    for (int64_t unit; (unit = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
      me.team->task(me.team->context, me.index, unit);
  }
#if defined(__x86_64__)
  _mm_sfence();  // streaming stores are weakly ordered
#endif
  return nullptr;
}
}  // namespace detail

inline void parallel(int64_t units, int threads, Task task, void* context) {
  detail::Team team;
  detail::Member members[MAX_THREADS] = {};
  pthread_t handles[MAX_THREADS];
  team.size = threads, team.task = task, team.context = context;
  for (int i = 0; i < threads; ++i) {
    team.share[i].next.store(units * i / threads, std::memory_order_relaxed);
    team.share[i].end = units * (i + 1) / threads;
    members[i] = {&team, i};
  }
  int started = 1;  // where the system refuses a thread, those that run do its share
  while (started < threads && pthread_create(&handles[started], nullptr, detail::work, &members[started]) == 0) ++started;
  detail::work(&members[0]);
  for (int i = 1; i < started; ++i) pthread_join(handles[i], nullptr);
}

}  // namespace sjr
