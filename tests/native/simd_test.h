// Interface between simd_test.cpp and the tests compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace mmk {

struct GemmShape {
  int64_t m, n, k;
};

struct SimdTests {
  int (*conversions)();  // each returns the number of failures and prints the first few
  int (*memory)();
  int (*arithmetic)();
  int (*gemm)();
  int (*math)();
  // Seconds that each of `threads` threads ran, on average, for one pass over a problem in the given tile, packing both
  // operands as it goes if `with_packing`.
  double (*time_gemm)(DType dtype, GemmShape problem, GemmShape tile, bool with_packing, int threads);
  double (*time_exp2)(int64_t n);
};
MMK_DECLARE_KERNELS(SimdTests, simd_tests)

}  // namespace mmk
