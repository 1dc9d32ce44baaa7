// tanh in device code.
#pragma once

#include "common/cuda/atoms.h"

namespace mmk::cuda {

struct Tanh {
  float value, slope;  // tanh(x) and its derivative 1 - tanh(x)^2
};

// The first half of tanh, which costs most of its registers. Near 0: tanh(x), from an odd polynomial. Elsewhere:
// (e^2|x| + 1) / 2 with the sign of x; at least 2.
__device__ __forceinline__ float tanh_seed(float x) {
  const float size = fabsf(x), z = x * x;
  float p = fmaf(-0.0062742396257817745f, z, 0.021071679890155792f);
  p = fmaf(p, z, -0.05385230854153633f);
  p = fmaf(p, z, 0.13332585990428925f);
  p = fmaf(p, z, -0.33333316445350647f);
  const float far = fmaf(exp2_fast(size * 2.8853900817779268f), 0.5f, 0.5f);
  return size < 0.55f ? fmaf(x, z * p, x) : copysignf(far, x);
}

// The second half. The value is within a few units in the last place; the derivative within 1e-7 (1 + |x|), relative,
// also where tanh rounds to 1.
__device__ __forceinline__ Tanh tanh_of_seed(float seed) {
  const float rest = __fdividef(1.f, fabsf(seed));
  const bool near = fabsf(seed) < 1.f;
  return {near ? seed : copysignf(1.f - rest, seed), near ? fmaf(-seed, seed, 1.f) : rest * (2.f - rest)};
}

__device__ __forceinline__ Tanh tanh_of(float x) { return tanh_of_seed(tanh_seed(x)); }

}  // namespace mmk::cuda
