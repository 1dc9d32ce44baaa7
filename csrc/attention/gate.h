// The epilogue of gated cross-attention: out = residual + tanh(gate) x, in one pass.
//
// Backward, with g the gradient of out (which is also that of the residual):
//   dx = tanh(gate) g      dgate = (1 - tanh(gate)^2) sum g x
//
// Shapes; the last dimension of each is contiguous:
//   residual, out, grad_out [N, C]   f32, bf16, f16, f64; inputs with any row stride, outputs contiguous
//   x, dx [N, C]                     the same dtype, or bf16 or f16 with an f32 residual
//   gate, dgate [G]                  f32 (f64 with f64), contiguous; G = C per column; else row n reads gate[n % G]
// N and C may be 0. Results do not depend on the number of threads.
#pragma once

#include "common/dispatch.h"
#include "common/tensor.h"

namespace mmk {

struct GateFwdArgs {
  // inputs
  Tensor residual, x, gate;
  bool by_column;
  // outputs
  Tensor out;
};

struct GateBwdArgs {
  // inputs
  Tensor grad_out, x, gate;
  bool by_column;
  // outputs
  Tensor dx, dgate;
};

struct GateKernels {
  void (*forward)(const GateFwdArgs& args, int num_threads);
  void (*backward)(const GateBwdArgs& args, int num_threads);
};
MMK_DECLARE_KERNELS(GateKernels, gate)

}  // namespace mmk
