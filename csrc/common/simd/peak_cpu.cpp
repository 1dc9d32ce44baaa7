#include "common/simd/gemm.h"
#include "common/simd/peak.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// As many independent chains as the GEMM has accumulators, enough to hide the latency on all target machines.
template <class T>
double multiply_add_loop(int64_t iterations) {
  constexpr int kChains = kRowTile * kColVectors;
  Vec<ComputeOf<T>> acc[kChains] = {};
  Vec<Word<T>> x = splat(static_cast<Word<T>>(0)), y = x;
  asm volatile("" : "+m"(x), "+m"(y));  // hide the constants from the compiler
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) acc[c] = multiply_add(acc[c], x, y);
#if defined(__aarch64__)
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) asm volatile("" : "+w"(acc[c]));
#else
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) asm volatile("" : "+v"(acc[c]));
#endif
  }
  return 2.0 * kLanes<ComputeOf<T>> * kWordElements<T> * kChains * static_cast<double>(iterations);
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(PeakKernels, peak) = {
    &MMK_ISA::multiply_add_loop<float>,
    &MMK_ISA::multiply_add_loop<double>,
    &MMK_ISA::multiply_add_loop<bf16>,
};

}  // namespace mmk
