// As much of CUDA as kernel.cu uses, for g++: its text, unchanged, runs on the CPU, under
// AddressSanitizer and UBSan.
//
// Every CUDA thread of a block is a fiber, and blocks run one after the other. A fiber runs until
// it meets a barrier. The order in which warps and fibers run is chosen per launch: a missing
// barrier may stay hidden in any single one. A barrier that not every thread of the block (or lane
// of the warp) reaches ends the launch with an error, where a GPU would hang or go on with garbage.
// __shared__ variables are static; the Python side fills them with NaN first.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define DLIF_WITHOUT_PTX
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum class Waits { nothing, for_block, for_warp, forever };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Waits waits;
  void* sanitizer_stack;
};

constexpr std::size_t stack_bytes = 256 << 10;
constexpr unsigned warp_size = 32;

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static const std::function<void()>* kernel_body;
static const void* scheduler_stack;
static std::size_t scheduler_stack_bytes;
static bool illegal_shuffle;

// AddressSanitizer has to be told of every change of stack.
inline void before_switch(void** save, const void* to, std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, to, bytes);
#else
  (void)save, (void)to, (void)bytes;
#endif
}
inline void after_switch(void* saved, const void** from, std::size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, from, bytes);
#else
  (void)saved, (void)from, (void)bytes;
#endif
}

inline void wait(Waits reason) {  // back to the scheduler, until it lets this fiber go on
  Fiber& fiber = fibers[threadIdx.x];
  fiber.waits = reason;
  before_switch(reason == Waits::forever ? nullptr : &fiber.sanitizer_stack,
                scheduler_stack,
                scheduler_stack_bytes);
  swapcontext(&fiber.context, &scheduler);
  after_switch(fiber.sanitizer_stack, nullptr, nullptr);
}

inline void fiber_main() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel_body)();
  wait(Waits::forever);
}

inline void resume(unsigned thread) {
  threadIdx = {thread, 0, 0};
  void* saved = nullptr;
  before_switch(&saved, fibers[thread].stack.get(), stack_bytes);
  swapcontext(&scheduler, &fibers[thread].context);
  after_switch(saved, nullptr, nullptr);
}

// Lets threads [begin, end) go on if all of them wait for the same barrier.
inline bool release(unsigned begin, unsigned end, Waits reason) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waits != reason) {
      return false;
    }
  }
  for (unsigned i = begin; i < end; ++i) {
    fibers[i].waits = Waits::nothing;
  }
  return true;
}

inline bool release_warps(unsigned threads) {
  bool any = false;
  for (unsigned begin = 0; begin < threads; begin += warp_size) {
    any |= release(begin, std::min(begin + warp_size, threads), Waits::for_warp);
  }
  return any;
}

using Group = std::vector<unsigned>;  // threads that run until all wait for the block, before the
                                      // next group does

inline bool run_block(unsigned threads, const std::vector<Group>& groups) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    fiber.waits = Waits::nothing;
    fiber.sanitizer_stack = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  do {
    for (const Group& group : groups) {
      do {
        for (unsigned i : group) {
          if (fibers[i].waits == Waits::nothing) {
            resume(i);
          }
        }
      } while (release_warps(threads));
    }
  } while (release(0, threads, Waits::for_block));
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].waits != Waits::forever) {
      return false;
    }
  }
  return true;
}

// seed 0: one warp as far as it can, from the first to the last; 1: from the last to the first;
// otherwise all threads side by side, in random order.
inline std::vector<Group> running_groups(unsigned threads, unsigned seed) {
  std::vector<Group> groups;
  for (unsigned i = 0; i < threads; ++i) {
    if (groups.empty() || (seed < 2 && i % warp_size == 0)) {
      groups.emplace_back();
    }
    groups.back().push_back(i);
  }
  if (seed == 1) {
    std::reverse(groups.begin(), groups.end());
  }
  std::minstd_rand random(seed);
  if (seed > 1) {
    std::shuffle(groups[0].begin(), groups[0].end(), random);
  }
  return groups;
}

enum Status { ok, divergent_barrier, partial_shuffle };

// `arguments` holds the address of every argument, as cuLaunchKernel takes them.
template <typename... A, std::size_t... I>
int launch(void (*kernel)(A...),
           unsigned grid,
           unsigned threads,
           unsigned seed,
           void** arguments,
           std::index_sequence<I...>) {
  const std::function<void()> body = [=] { kernel(*static_cast<A*>(arguments[I])...); };
  const std::vector<Group> groups = running_groups(threads, seed);
  while (fibers.size() < threads) {
    fibers.push_back({{}, std::unique_ptr<char[]>(new char[stack_bytes]), {}, nullptr});
  }
  kernel_body = &body;
  illegal_shuffle = false;
  blockDim = {threads, 1, 1}, gridDim = {grid, 1, 1};
  for (unsigned block = 0; block < grid; ++block) {
    blockIdx = {block, 0, 0};
    if (!run_block(threads, groups)) {
      return divergent_barrier;
    }
  }
  return illegal_shuffle ? partial_shuffle : ok;
}
template <typename... A>
int launch(void (*kernel)(A...), unsigned grid, unsigned threads, unsigned seed, void** arguments) {
  return launch(kernel, grid, threads, seed, arguments, std::index_sequence_for<A...>());
}

// One letter per parameter: p pointer, q 64-bit integer, i 32-bit integer, f float.
template <typename A>
constexpr char letter() {
  return std::is_pointer_v<A>       ? 'p'
         : std::is_same_v<A, float> ? 'f'
         : std::is_same_v<A, int>   ? 'i'
                                    : 'q';
}
template <typename... A>
const char* signature(void (*)(A...)) {
  static const char letters[] = {letter<A>()..., '\0'};
  return letters;
}

template <typename To, typename From>
To as_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace shim

inline void __syncthreads() {
  shim::wait(shim::Waits::for_block);
}

inline float __shfl_down_sync(unsigned mask, float value, unsigned distance) {
  static float exchanged[2][1024];
  static bool parity[1024];  // two rows in turn, so that one barrier per exchange is enough
  const unsigned thread = threadIdx.x, lane = thread % shim::warp_size;
  shim::illegal_shuffle |= mask != 0xffffffffu || blockDim.x % shim::warp_size != 0;
  float* row = exchanged[parity[thread]];
  parity[thread] = !parity[thread];
  row[thread] = value;
  shim::wait(shim::Waits::for_warp);
  return lane + distance < shim::warp_size ? row[thread + distance] : value;
}

inline unsigned __float_as_uint(float value) {
  return shim::as_bits<unsigned>(value);
}
inline float __uint_as_float(unsigned bits) {
  return shim::as_bits<float>(bits);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}  // built with -ffp-contract=off
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __powf(float base, float exponent) {
  return std::pow(base, exponent);
}
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline float min(float a, float b) {
  return a < b ? a : b;
}
inline float max(float a, float b) {
  return a > b ? a : b;
}

struct Half;
float half_to_float(Half a);
Half float_to_half(float value);
