#include "common/parallel.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mmk {
namespace {

// OpenMP's worker threads do not survive fork(), and other libraries share the runtime and may already have started
// them. So only the process that loaded this library runs in parallel.
const pid_t loading_process = getpid();

// Keeps the first exception of a parallel region, because exceptions must not leave an OpenMP thread.
class FirstException {
 public:
  void capture() noexcept {
    if (!taken_.exchange(true)) error_ = std::current_exception();
  }
  bool any() const noexcept { return taken_.load(std::memory_order_relaxed); }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> taken_{false};
  std::exception_ptr error_;
};

}  // namespace

int usable_threads(int64_t n_tasks, int num_threads) {
#ifdef _OPENMP
  if (num_threads <= 1 || n_tasks <= 1 || omp_in_parallel() || getpid() != loading_process) return 1;
  return static_cast<int>(n_tasks < num_threads ? n_tasks : num_threads);
#else
  (void)n_tasks;
  (void)num_threads;
  return 1;
#endif
}

namespace detail {

void run_tasks(int64_t n_tasks, int num_threads, TaskFn fn, void* context) {
  const int threads = usable_threads(n_tasks, num_threads);
  if (threads == 1) {
    for (int64_t task = 0; task < n_tasks; ++task) fn(context, task, 0);
    return;
  }
#ifdef _OPENMP
  FirstException error;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < n_tasks; ++task) {
    if (error.any()) continue;
    try {
      fn(context, task, omp_get_thread_num());
    } catch (...) {
      error.capture();
    }
  }
  error.rethrow();
#endif
}

void run_chunks(int64_t n, int num_threads, ChunkFn fn, void* context) {
  struct Split {
    int64_t n, chunks;
    ChunkFn fn;
    void* context;
  };
  if (n <= 0) return;
  Split split{n, usable_threads(n, num_threads), fn, context};
  const auto run_one = [](void* c, int64_t chunk, int thread) {
    const Split& s = *static_cast<Split*>(c);
    const int64_t share = s.n / s.chunks, extra = s.n % s.chunks;
    const int64_t begin = chunk * share + (chunk < extra ? chunk : extra);
    s.fn(s.context, begin, begin + share + (chunk < extra ? 1 : 0), thread);
  };
  run_tasks(split.chunks, num_threads, run_one, &split);
}

void* allocate_aligned(size_t bytes) {
  constexpr size_t alignment = 64;
  const size_t rounded = (bytes / alignment + 1) * alignment;  // at least one line, so that an empty request is valid
  void* p = std::aligned_alloc(alignment, rounded);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

void free_aligned(void* p) noexcept { std::free(p); }

}  // namespace detail
}  // namespace mmk
