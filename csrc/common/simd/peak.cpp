#include "common/simd/peak.h"

#include <time.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/parallel.h"

namespace mmk {
namespace {

double thread_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

double measure_fma_peak(DType dtype, int threads, double seconds) {
  const PeakKernels& kernels = peak_kernels();
  const auto loop = dtype == DType::f64 ? kernels.f64 : dtype == DType::bf16 ? kernels.bf16 : kernels.f32;
  const int used = usable_threads(threads, threads);

  // Slices of about a millisecond on all threads at once, timed by each thread's CPU time, so that other programs
  // affect neither the figure nor the number of slices.
  int64_t iterations = 1 << 10;
  for (double spent = 0; spent < 5e-4; iterations *= 2) {
    const double start = thread_time();
    loop(iterations);
    spent = thread_time() - start;
  }
  std::vector<double> rates(used);
  double best = 0;
  for (const double begin = thread_time(); best == 0 || thread_time() - begin < seconds;) {
    parallel_chunks(used, used, [&](int64_t chunk, int64_t, int) {
      const double start = thread_time();
      const double flops = loop(iterations);
      rates[chunk] = flops / (thread_time() - start);
    });
    best = std::max(best, std::accumulate(rates.begin(), rates.end(), 0.0));
  }
  return best;
}

}  // namespace mmk
