// Includes SJR_BODY once per instruction set, inside namespace sjr::<set>, with SJR_VECTOR_BYTES
// set to its vector width and SJR_LEVEL to 0, 1 or 2: a compiler need not define __AVX2__ and the
// like inside a region with that target. One source, one object, no per-file compiler flags; no
// header of the standard library may be included by the body, so that no function compiled for a
// newer processor can replace a shared one.
#if !defined(SJR_BASELINE_BYTES)
#define SJR_BASELINE_BYTES \
  16  // SSE2, NEON; tests may widen it to run the code path of another width
#endif

// What an instruction set makes of a name.
#if defined(__x86_64__)
#define SJR_OF_SET(job, name)                               \
  ((job).instruction_set == sjr::AVX512 ? sjr::avx512::name \
   : (job).instruction_set == sjr::AVX2 ? sjr::avx2::name   \
                                        : sjr::baseline::name)
#else
#define SJR_OF_SET(job, name) (sjr::baseline::name)
#endif

#define SJR_TARGET_INLINE inline __attribute__((always_inline))
#define SJR_INLINE static SJR_TARGET_INLINE
// SJR_UNROLL lets a loop over vectors handle two cache lines at a time.
#define SJR_PRAGMA_OF(text) _Pragma(#text)
#define SJR_PRAGMA(text) SJR_PRAGMA_OF(text)
#if defined(__clang__)
#define SJR_UNROLL SJR_PRAGMA(clang loop unroll_count(128 / SJR_VECTOR_BYTES))
#else
#define SJR_UNROLL SJR_PRAGMA(GCC unroll 128 / SJR_VECTOR_BYTES)
#endif

// Iterations of the loop that follows do not depend on each other.
#if defined(__clang__)
#define SJR_APART SJR_PRAGMA(clang loop vectorize(assume_safety))
#else
#define SJR_APART SJR_PRAGMA(GCC ivdep)
#endif

#define SJR_SET baseline
#define SJR_LEVEL 0
#define SJR_VECTOR_BYTES SJR_BASELINE_BYTES
#include SJR_BODY
#undef SJR_SET
#undef SJR_LEVEL
#undef SJR_VECTOR_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define SJR_SET avx2
#define SJR_LEVEL 1
#define SJR_VECTOR_BYTES 32
#include SJR_BODY
#undef SJR_SET
#undef SJR_LEVEL
#undef SJR_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define SJR_SET avx512
#define SJR_LEVEL 2
#define SJR_VECTOR_BYTES 64
#include SJR_BODY
#undef SJR_SET
#undef SJR_LEVEL
#undef SJR_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
#undef SJR_BODY
