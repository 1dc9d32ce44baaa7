// Threads and scratch memory for the CPU kernels.
//
// The OpenMP region and all exception handling live in parallel.cpp, compiled once for the baseline; kernel files see
// only a trampoline with internal linkage. So the linker cannot merge code compiled for a wider instruction set into
// code that must run everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmk {
namespace detail {

using TaskFn = void (*)(void* context, int64_t task, int thread);
using ChunkFn = void (*)(void* context, int64_t begin, int64_t end, int thread);

void run_tasks(int64_t n_tasks, int num_threads, TaskFn fn, void* context);
void run_chunks(int64_t n, int num_threads, ChunkFn fn, void* context);

void* allocate_aligned(size_t bytes);  // 64-byte aligned, not cleared; throws std::bad_alloc
void free_aligned(void* p) noexcept;

}  // namespace detail

// The number of threads that parallel_for and parallel_chunks actually use for `n_tasks` tasks given `num_threads`: 1
// without OpenMP and in a forked child, where another OpenMP region would deadlock. Thread ids are below it; size
// per-thread scratch by it.
int usable_threads(int64_t n_tasks, int num_threads);

// Calls fn(task, thread) for every task in [0, n_tasks), in any order; a free thread takes the next task. An exception
// of fn is rethrown after all threads have stopped.
template <class F>
static inline void parallel_for(int64_t n_tasks, int num_threads, F&& fn) {
  F* context = &fn;
  detail::run_tasks(
      n_tasks, num_threads, [](void* c, int64_t task, int thread) { (**static_cast<F**>(c))(task, thread); }, &context);
}

// Splits [0, n) into one contiguous chunk per thread and calls fn(begin, end, thread). The split depends only on n and
// the thread count.
template <class F>
static inline void parallel_chunks(int64_t n, int num_threads, F&& fn) {
  F* context = &fn;
  detail::run_chunks(
      n, num_threads,
      [](void* c, int64_t begin, int64_t end, int thread) { (**static_cast<F**>(c))(begin, end, thread); }, &context);
}

// A block of 64-byte aligned scratch memory, uninitialised, freed at scope exit.
template <class T>
class AlignedBuffer {
 public:
  __attribute__((always_inline)) explicit AlignedBuffer(int64_t count)
      : data_(static_cast<T*>(detail::allocate_aligned(static_cast<size_t>(count) * sizeof(T)))) {}
  __attribute__((always_inline)) ~AlignedBuffer() { detail::free_aligned(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  __attribute__((always_inline)) T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace mmk
