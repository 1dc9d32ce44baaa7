// The prologue of attention: normalisation over the head dim and rotary embedding, in one pass.
//
//   h = (x - mu) / sqrt(mean (x - mu)^2 + eps)     n = h w + b     y_a = n_a cos - n_b sin     y_b = n_b cos + n_a sin
//
// with mu = 0 for rms, for the pairs (a, b) = (j, j + R/2), or (2j, 2j + 1) if interleaved; elements from R on are not
// rotated. Backward, with g the gradient of n (y's, rotated back) and u = g w:
//   dx = (u - [mean u, layer only] - h mean(u h)) / sqrt(...)     dweight = sum_rows g h     dbias = sum_rows g
//
// Shapes; the last dimension of each is contiguous:
//   x, y, grad_out, dx [T, H, D]   one dtype: f32, bf16, f16, f64; x and grad_out with strides, y and dx contiguous
//   cos, sin [P, R/2]              contiguous; token t reads row t % P; not given: no rotation
//   weight, bias [D]               not given: 1 and 0; with Norm::none neither
//   dweight [D], dbias [D]         written with a norm, dbias with layer only
// All but the first line are f32 (f64 with f64). T may be 0; 0 < R <= D, even. Results do not depend on the number of
// threads.
#pragma once

#include "common/dispatch.h"
#include "common/tensor.h"

namespace mmk {

enum class Norm : int { none = 0, rms = 1, layer = 2 };

struct NormRopeFwdArgs {
  // inputs
  Tensor x, cos, sin, weight, bias;
  // outputs
  Tensor y;
  // options
  Norm norm;
  double eps;
  bool interleaved;
};

struct NormRopeBwdArgs {
  // inputs
  Tensor grad_out, x, cos, sin, weight;  // x is optional with Norm::none
  // outputs
  Tensor dx, dweight, dbias;
  // options
  Norm norm;
  double eps;
  bool interleaved;
};

struct RopeKernels {
  void (*forward)(const NormRopeFwdArgs& args, int num_threads);
  void (*backward)(const NormRopeBwdArgs& args, int num_threads);
};
MMK_DECLARE_KERNELS(RopeKernels, rope)

}  // namespace mmk
