// Test and bench of csrc/common; CMakeLists.txt has the commands. Exit status 0 on success.
#include "simd_test.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "common/simd/peak.h"

namespace {

using namespace mmk;

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  std::printf("  failed: %s\n", what);
}

void test_parallel() {
  constexpr int64_t n = 1000;
  std::vector<std::atomic<int>> seen(n);
  const int threads = usable_threads(n, 3);
  expect(usable_threads(2, 8) <= 2 && usable_threads(0, 8) == 1, "usable_threads is bounded by the tasks");
  parallel_for(n, 3, [&](int64_t task, int thread) { seen[task] += thread < threads ? 1 : 1000; });
  for (auto& count : seen) expect(count == 1, "parallel_for: every task once, on a thread below usable_threads");

  for (int64_t size : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> touched(size);
    parallel_chunks(size, 3, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) ++touched[i];
    });
    for (auto& count : touched) expect(count == 1, "parallel_chunks: a partition");
  }

  bool thrown = false;
  try {
    parallel_for(100, 3, [&](int64_t task, int) {
      if (task == 50) throw std::runtime_error("task 50");
    });
  } catch (const std::runtime_error& error) {
    thrown = std::strcmp(error.what(), "task 50") == 0;
  }
  expect(thrown, "parallel_for rethrows");

  bool refused = false;
  try {
    AlignedBuffer<char> huge(int64_t{1} << 60);
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  expect(refused, "AlignedBuffer throws std::bad_alloc");
  AlignedBuffer<double> empty(0);
  expect(reinterpret_cast<uintptr_t>(empty.data()) % 64 == 0, "AlignedBuffer is aligned");
}

// The parent has used threads: the child must finish, on one thread, instead of waiting for threads it lost.
void test_fork() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::atomic<int> done{0};
    int most = 0;
    parallel_for(8, 4, [&](int64_t, int thread) {
      most = std::max(most, thread);
      ++done;
    });
    _exit(done == 8 && most == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "parallel_for in a forked child runs on one thread");
}

void bench(double seconds) {
  const char* names[] = {"f32", "bf16", "f16", "f64"};
  const GemmShape problem{1536, 1536, 512};
  for (int threads : {1, 2})
    for (DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      const double peak_before = measure_fma_peak(dtype, threads, seconds / 2);
      const double peak = std::max(peak_before, measure_fma_peak(dtype, threads, seconds / 2));
      for (GemmShape tile : {GemmShape{192, 256, 512}, GemmShape{96, 512, 512}, GemmShape{512, 512, 512}})
        for (bool with_packing : {false, true}) {
          double best = 1e30;
          for (double spent = 0; spent < seconds;) {
            const double elapsed = simd_tests_kernels().time_gemm(dtype, problem, tile, with_packing, threads);
            best = std::min(best, elapsed);
            spent += elapsed;
          }
          const double flops = 2.0 * problem.m * problem.n * problem.k / best;
          std::printf("%s %d thread%s tile %ldx%ldx%ld%s: %.1f GFLOP/s, %.1f%% of the measured peak %.1f\n",
                      names[static_cast<int>(dtype)], threads, threads > 1 ? "s" : "", long(tile.m), long(tile.n),
                      long(tile.k), with_packing ? " with packing" : "", flops / 1e9, 100 * flops / peak, peak / 1e9);
        }
    }
  double best = 1e30;
  const int64_t n = 1 << 22;
  for (int i = 0; i < 10; ++i) best = std::min(best, simd_tests_kernels().time_exp2(n));
  std::printf("exp2 f32 1 thread: %.2f G elements/s\n", n / best / 1e9);
}

int run(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "bench") == 0) {
    std::printf("instruction set: %s\n", cpu_isa());
    bench(argc > 2 ? std::atof(argv[2]) : 0.5);
    return 0;
  }
  if (argc > 1 && std::strcmp(argv[1], "list") == 0) {  // the sets that this machine can run
    for (const char* const* name = compiled_isas(); *name != nullptr; ++name)
      if (isa_supported(*name)) std::printf("%s\n", *name);
    return 0;
  }
  std::printf("instruction set: %s\n", cpu_isa());
  test_parallel();
  test_fork();
  const SimdTests& tests = simd_tests_kernels();
  const auto run = [](const char* name, int (*test)()) {
    std::printf("%s\n", name);
    std::fflush(stdout);
    const int count = test();
    if (count > 0) std::printf("  %d failures\n", count);
    failures += count;
  };
  run("conversions", tests.conversions);
  run("memory", tests.memory);
  run("arithmetic", tests.arithmetic);
  run("gemm", tests.gemm);
  run("math", tests.math);
  expect(measure_fma_peak(DType::f32, 1, 0.01) > 1e8, "the measured peak is that of a computer");
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
