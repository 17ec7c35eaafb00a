// DLIF over all time steps, forward and backward, in one kernel each.
//
// The launcher appends DLIF_FORWARD(...) or DLIF_BACKWARD(...) lines, which name the variants
// wanted, to this text; no header is needed. Tensors are float, half or bfloat16, arithmetic and
// potentials are float.
//
// One thread owns VEC neighbouring neurons for the whole sequence. Backward saves nothing: it
// computes the potentials again, STEPS of them at a time, and keeps those in registers. Up to 32
// steps the sequence is one such segment (LONG = false); a longer one (LONG = true) is walked
// through once to note the potential at the start of every segment in `checkpoints`, then backwards
// segment by segment.

typedef long long i64;

enum Reset { RESET_TO_ZERO, RESET_TO_VALUE, RESET_BY_SUBTRACTION };

constexpr int WARP_SIZE = 32, MAX_WARPS = 32;  // threads per block: a multiple of 32, at most 1024

struct Constants {
  float decay, leak_current, v_threshold, v_reset, alpha;
};

// ---- 16-bit formats, as bits so that no CUDA header is needed ----

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

#ifndef DLIF_WITHOUT_PTX  // the CPU build of the tests brings its own two conversions
__device__ __forceinline__ float half_to_float(Half a) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(a.bits));
  return value;
}
__device__ __forceinline__ Half float_to_half(float value) {
  Half a;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a.bits) : "f"(value));
  return a;
}
#endif
#if !defined(DLIF_WITHOUT_PTX) && __CUDA_ARCH__ >= 800
#define DLIF_ROUNDS_PAIRS  // by one instruction for two numbers
#endif

__device__ __forceinline__ float to_float(float a) {
  return a;
}
__device__ __forceinline__ float to_float(Half a) {
  return half_to_float(a);
}
__device__ __forceinline__ float to_float(BFloat16 a) {
  return __uint_as_float((unsigned)a.bits << 16);
}

__device__ __forceinline__ unsigned short rounded(Half, float value) {
  return float_to_half(value).bits;
}
__device__ __forceinline__ unsigned short rounded(BFloat16,
                                                  float value) {  // to nearest, ties to even
  const unsigned bits = __float_as_uint(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? 0x7fc0u : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Two neighbours as one word, the first in its lower half.
#ifdef DLIF_ROUNDS_PAIRS
__device__ __forceinline__ unsigned rounded(Half, float first, float second) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ unsigned rounded(BFloat16, float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#else
template <typename IO>
__device__ __forceinline__ unsigned rounded(IO format, float first, float second) {
  return rounded(format, first) | (unsigned)rounded(format, second) << 16;
}
#endif

// ---- loads and stores of VEC neighbours at once; the launcher sees to the alignment ----

template <typename IO, int VEC>
struct alignas(VEC * sizeof(IO)) Pack {
  IO at[VEC];
};

template <int VEC, typename IO>
__device__ __forceinline__ Pack<IO, VEC> load(const IO* from) {
  return *(const Pack<IO, VEC>*)from;
}

// Whole vectors of words, of outputs that no kernel reads: a compiler may split any store that it
// understands.
__device__ __forceinline__ void put(void* to, unsigned a, unsigned b) {
#ifdef DLIF_WITHOUT_PTX
  ((unsigned*)to)[0] = a, ((unsigned*)to)[1] = b;
#else
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b));
#endif
}
__device__ __forceinline__ void put(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
#ifdef DLIF_WITHOUT_PTX
  put(to, a, b), put((unsigned*)to + 2, c, d);
#else
  asm volatile(
      "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d));
#endif
}

__device__ __forceinline__ void store_values(float* to, const float (&v)[4]) {
  put(to,
      __float_as_uint(v[0]),
      __float_as_uint(v[1]),
      __float_as_uint(v[2]),
      __float_as_uint(v[3]));
}
__device__ __forceinline__ void store_values(float* to, const float (&v)[2]) {
  put(to, __float_as_uint(v[0]), __float_as_uint(v[1]));
}
__device__ __forceinline__ void store_values(float* to, const float (&v)[1]) {
  *to = v[0];
}

template <typename IO>
__device__ __forceinline__ void store_values(IO* to, const float (&v)[4]) {
  put(to, rounded(IO(), v[0], v[1]), rounded(IO(), v[2], v[3]));
}
template <typename IO>
__device__ __forceinline__ void store_values(IO* to, const float (&v)[2]) {
  *(unsigned*)to = rounded(IO(), v[0], v[1]);
}
template <typename IO>
__device__ __forceinline__ void store_values(IO* to, const float (&v)[1]) {
  to->bits = rounded(IO(), v[0]);
}

// `from` may be null, which stands for `otherwise` everywhere
template <int VEC>
__device__ __forceinline__ void load_or(float (&values)[VEC],
                                        const float* from,
                                        i64 i,
                                        float otherwise) {
  Pack<float, VEC> pack = {};
  if (from) {
    pack = load<VEC>(from + i);
  }
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    values[j] = from ? pack.at[j] : otherwise;
  }
}

// What the same thread loads again.
template <int VEC>
__device__ __forceinline__ void note(float* to, const float (&values)[VEC]) {
  Pack<float, VEC> pack;
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    pack.at[j] = values[j];
  }
  *(Pack<float, VEC>*)to = pack;
}

// ---- surrogate derivatives g(z), z = h - v_threshold, by the names of SpikingJelly's classes ----

struct PiecewiseQuadratic {
  static __device__ __forceinline__ float derivative(float z, float alpha) {
    const float height = alpha - alpha * alpha * fabsf(z);
    return height < 0.0f ? 0.0f : height;
  }
};

struct ATan {
  static __device__ __forceinline__ float derivative(float z, float alpha) {
    const float scaled = 1.57079632679489662f * alpha * z;
    return 0.5f * alpha / (1.0f + scaled * scaled);
  }
};

struct Sigmoid {
  static __device__ __forceinline__ float derivative(float z, float alpha) {
    const float s = 1.0f / (1.0f + expf(-alpha * z));
    return alpha * s * (1.0f - s);
  }
};

struct PiecewiseExp {
  static __device__ __forceinline__ float derivative(float z, float alpha) {
    return 0.5f * alpha * expf(-alpha * fabsf(z));
  }
};

struct SoftSign {
  static __device__ __forceinline__ float derivative(float z, float alpha) {
    const float root = 1.0f + alpha * fabsf(z);
    return 0.5f * alpha / (root * root);
  }
};

struct SuperSpike {
  static __device__ __forceinline__ float derivative(float z, float alpha) {
    const float root = 1.0f + fabsf(z);
    return alpha / (root * root);
  }
};

struct Erf {
  static __device__ __forceinline__ float derivative(float z, float alpha) {
    const float scaled = alpha * z;
    return 0.56418958354775629f * alpha * expf(-scaled * scaled);
  }
};

// ---- the neuron ----

// Rounded after every operation, whatever the compiler options: spikes equal those of the torch
// reference bit by bit.
template <Reset RESET>
__device__ __forceinline__ float charge(float v, float x, float gain, const Constants& c) {
  const float h = __fadd_rn(__fmul_rn(v, c.decay), __fmul_rn(x, gain));
  return RESET == RESET_TO_VALUE ? __fadd_rn(h, c.leak_current) : h;
}

template <Reset RESET>
__device__ __forceinline__ float potential_at_rest(const Constants& c) {
  return RESET == RESET_TO_VALUE ? c.v_reset : 0.0f;
}

template <Reset RESET>
__device__ __forceinline__ float reset(float h, const Constants& c) {
  if (!(h >= c.v_threshold)) {
    return h;
  }
  return RESET == RESET_BY_SUBTRACTION ? h - c.v_threshold : potential_at_rest<RESET>(c);
}

// Gradient of h from the gradients of the spike and of the potential after reset.
template <Reset RESET, bool DETACH, typename SURROGATE>
__device__ __forceinline__ float grad_charge(float h,
                                             float grad_spike,
                                             float grad_v,
                                             const Constants& c) {
  const float g = SURROGATE::derivative(h - c.v_threshold, c.alpha);
  if (RESET == RESET_BY_SUBTRACTION) {
    if (!DETACH) {
      grad_spike -= grad_v * c.v_threshold;
    }
    return grad_spike * g + grad_v;
  }
  if (!DETACH) {
    grad_spike += grad_v * (potential_at_rest<RESET>(c) - h);
  }
  return grad_spike * g + (h >= c.v_threshold ? 0.0f : grad_v);
}

__device__ __forceinline__ float warp_sum(float value) {  // the sum is in lane 0
#pragma unroll
  for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

// ---- kernels; x_seq and everything else with a time axis is [steps, neurons], neurons is a
// multiple of VEC ----

template <typename IO, int STEPS, bool LONG, int VEC, Reset RESET, bool V_SEQ>
__device__ __forceinline__ void forward(const IO* __restrict__ x_seq,
                                        const float* __restrict__ input_gain,
                                        const float* __restrict__ v_init,
                                        IO* __restrict__ spike_seq,
                                        float* __restrict__ v_last,
                                        float* __restrict__ v_seq,
                                        i64 neurons,
                                        int long_steps,
                                        const Constants& c) {
  const i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
  if (i >= neurons) {
    return;
  }
  const int steps = LONG ? long_steps : STEPS;
  float v[VEC], spike[VEC];
  load_or<VEC>(v, v_init, i, potential_at_rest<RESET>(c));
#pragma unroll
  for (int t = 0; t < steps; ++t) {
    const Pack<IO, VEC> x = load<VEC>(x_seq + t * neurons + i);
    const float gain = input_gain[t];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float h = charge<RESET>(v[j], to_float(x.at[j]), gain, c);
      spike[j] = h >= c.v_threshold ? 1.0f : 0.0f;
      v[j] = reset<RESET>(h, c);
    }
    store_values(spike_seq + t * neurons + i, spike);
    if (V_SEQ) {
      store_values(v_seq + t * neurons + i, v);
    }
  }
  store_values(v_last + i, v);
}

// v_init, grad_v_last, grad_v_init and (unless LONG) checkpoints may be null, grad_v_seq is read if
// V_SEQ. partial_grad_gain is [blocks, steps]: every block's share of the gradient of input_gain,
// summed in a fixed order.
template <typename IO,
          int STEPS,
          bool LONG,
          int VEC,
          Reset RESET,
          bool V_SEQ,
          bool DETACH,
          typename SURROGATE>
__device__ __forceinline__ void backward(const IO* __restrict__ x_seq,
                                         const float* __restrict__ input_gain,
                                         const float* __restrict__ v_init,
                                         const IO* __restrict__ grad_spike_seq,
                                         const float* __restrict__ grad_v_last,
                                         const float* __restrict__ grad_v_seq,
                                         IO* __restrict__ grad_x_seq,
                                         float* __restrict__ grad_v_init,
                                         float* __restrict__ partial_grad_gain,
                                         float* __restrict__ checkpoints,
                                         i64 neurons,
                                         int long_steps,
                                         const Constants& c) {
  __shared__ float warp_sums[STEPS][MAX_WARPS];
  const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE,
            warps = blockDim.x / WARP_SIZE;
  const i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
  const bool active = i < neurons;  // idle threads stay for the sums over the block
  const int steps = LONG ? long_steps : STEPS;
  const int segments = LONG ? (steps + STEPS - 1) / STEPS : 1;

  float v[VEC], grad_v[VEC] = {};
  if (active) {
    load_or<VEC>(v, v_init, i, potential_at_rest<RESET>(c));
    load_or<VEC>(grad_v, grad_v_last, i, 0.0f);
  }
  if (LONG && active) {
    for (int t = 0; t < (segments - 1) * STEPS; ++t) {
      if (t % STEPS == 0) {
        note(checkpoints + t / STEPS * neurons + i, v);
      }
      const Pack<IO, VEC> x = load<VEC>(x_seq + t * neurons + i);
      const float gain = input_gain[t];
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        v[j] = reset<RESET>(charge<RESET>(v[j], to_float(x.at[j]), gain, c), c);
      }
    }
  }

  for (int segment = segments - 1; segment >= 0; --segment) {
    const int first = segment * STEPS, count = LONG ? min(STEPS, steps - first) : STEPS;
    if (LONG && active && segment < segments - 1) {
      load_or<VEC>(v, checkpoints + segment * neurons, i, 0.0f);
    }

    Pack<IO, VEC> x[STEPS];
    float h[STEPS][VEC];
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      if (!active || (LONG && k >= count)) {
        continue;
      }
      x[k] = load<VEC>(x_seq + (first + k) * neurons + i);
      const float gain = input_gain[first + k];
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        h[k][j] = charge<RESET>(v[j], to_float(x[k].at[j]), gain, c);
        v[j] = reset<RESET>(h[k][j], c);
      }
    }

    Pack<IO, VEC> upcoming = {};
    if (active) {
      upcoming = load<VEC>(grad_spike_seq + (first + count - 1) * neurons + i);
    }
#pragma unroll
    for (int k = STEPS - 1; k >= 0; --k) {
      if (LONG && k >= count) {
        continue;  // the same for the whole block
      }
      float grad_gain = 0.0f;
      if (active) {
        const i64 at = (first + k) * neurons + i;
        const Pack<IO, VEC> grad_spike = upcoming;
        if (k > 0) {
          upcoming =
              load<VEC>(grad_spike_seq + at - neurons);  // on its way while this step computes
        }
        const float gain = input_gain[first + k];
        Pack<float, VEC> grad_v_here = {};
        if (V_SEQ) {
          grad_v_here = load<VEC>(grad_v_seq + at);
        }
        float grad_x[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          if (V_SEQ) {
            grad_v[j] += grad_v_here.at[j];
          }
          const float grad_h = grad_charge<RESET, DETACH, SURROGATE>(
              h[k][j], to_float(grad_spike.at[j]), grad_v[j], c);
          grad_x[j] = grad_h * gain;
          grad_gain += grad_h * to_float(x[k].at[j]);
          grad_v[j] = grad_h * c.decay;
        }
        store_values(grad_x_seq + at, grad_x);
      }
      grad_gain = warp_sum(grad_gain);
      if (lane == 0) {
        warp_sums[k][warp] = grad_gain;
      }
    }

    __syncthreads();
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
      float sum = 0.0f;
      for (int w = 0; w < warps; ++w) {
        sum += warp_sums[k][w];
      }
      partial_grad_gain[(i64)blockIdx.x * steps + first + k] = sum;
    }
    if (LONG) {
      __syncthreads();  // the next segment writes to warp_sums again
    }
  }
  if (active && grad_v_init) {
    store_values(grad_v_init + i, grad_v);
  }
}

#define DLIF_FORWARD(NAME, THREADS, IO, ...)                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const IO* __restrict__ x_seq,         \
                                                             const float* __restrict__ input_gain, \
                                                             const float* __restrict__ v_init,     \
                                                             IO* __restrict__ spike_seq,           \
                                                             float* __restrict__ v_last,           \
                                                             float* __restrict__ v_seq,            \
                                                             i64 neurons,                          \
                                                             int steps,                            \
                                                             float decay,                          \
                                                             float leak_current,                   \
                                                             float v_threshold,                    \
                                                             float v_reset) {                      \
    const Constants c = {decay, leak_current, v_threshold, v_reset, 0.0f};                         \
    forward<IO, __VA_ARGS__>(                                                                      \
        x_seq, input_gain, v_init, spike_seq, v_last, v_seq, neurons, steps, c);                   \
  }

#define DLIF_BACKWARD(NAME, THREADS, IO, ...)                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                     \
      NAME(const IO* __restrict__ x_seq,                                    \
           const float* __restrict__ input_gain,                            \
           const float* __restrict__ v_init,                                \
           const IO* __restrict__ grad_spike_seq,                           \
           const float* __restrict__ grad_v_last,                           \
           const float* __restrict__ grad_v_seq,                            \
           IO* __restrict__ grad_x_seq,                                     \
           float* __restrict__ grad_v_init,                                 \
           float* __restrict__ partial_grad_gain,                           \
           float* __restrict__ checkpoints,                                 \
           i64 neurons,                                                     \
           int steps,                                                       \
           float decay,                                                     \
           float leak_current,                                              \
           float v_threshold,                                               \
           float v_reset,                                                   \
           float alpha) {                                                   \
    const Constants c = {decay, leak_current, v_threshold, v_reset, alpha}; \
    backward<IO, __VA_ARGS__>(x_seq,                                        \
                              input_gain,                                   \
                              v_init,                                       \
                              grad_spike_seq,                               \
                              grad_v_last,                                  \
                              grad_v_seq,                                   \
                              grad_x_seq,                                   \
                              grad_v_init,                                  \
                              partial_grad_gain,                            \
                              checkpoints,                                  \
                              neurons,                                      \
                              steps,                                        \
                              c);                                           \
  }
