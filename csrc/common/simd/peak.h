// Measured arithmetic peak of this machine: the ceiling that benches report fractions of.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace mmk {

// Each runs `iterations` rounds of independent register-only multiply-adds and returns their total flops.
struct PeakKernels {
  double (*f32)(int64_t iterations);
  double (*f64)(int64_t iterations);
  double (*bf16)(int64_t iterations);  // the instruction that multiplies packed bf16 operands: bf16 dot product or FMA
};
MMK_DECLARE_KERNELS(PeakKernels, peak)

// Flop/s of `threads` concurrent threads by CPU time: the best of many slices of about a millisecond, for about
// `seconds`. f16 is computed in float, so its peak is float's.
double measure_fma_peak(DType dtype, int threads, double seconds);

}  // namespace mmk
