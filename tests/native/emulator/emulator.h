// Runs the package's CUDA kernels on a CPU, for tests on machines without a GPU. An emulation, not a device: it shows
// that indexing, masks, synchronisation and arithmetic follow the rules of CUDA and PTX, says nothing about speed, and
// does not replace `pytest -m gpu`.
//
// Blocks run one at a time; a block's threads are fibers, switched wherever CUDA synchronises (barriers, shuffles,
// warp-wide matrix instructions). To expose mistakes that could go unnoticed:
//   - the order in which fibers and blocks run is drawn from a seed; a result that depends on it differs between seeds
//   - shared memory is NaN at the start of a block; bytes past its end are checked
//   - cp.async leaves NaN at its target until cp.async.wait_group, and reads its source only then
//   - lanes of a warp that meet in different instructions, a barrier that some threads never reach, ldmatrix rows
//     outside shared memory or misaligned, blocks or grids beyond CUDA's limits: each is an error that says where
//   - access past a tensor that the test placed before a guard page is an error too (see `fence`)
// With a seed, warps also run at different speeds. async.h describes what sm_90a adds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The running fiber's.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// The emulated device.
struct Settings {
  uint64_t seed = 0;        // 0: ascending order, else shuffled
  int multiprocessors = 3;  // few, so that small problems fill several rounds of a persistent grid
  int capability = 80;      // 10 * major + minor

  size_t shared_limit() const { return (capability == 90 ? 227 : 99) * size_t{1024}; }
};
extern Settings settings;

// Counters since the last reset, so that a test can tell which path was taken.
struct Counts {
  int64_t launches, blocks, barriers, matrix_products, async_copies, warpgroup_products, tma_loads, tma_stores;
};
extern Counts counts;

void run(const char* kernel, dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

[[noreturn]] void fail(const std::string& what);

void barrier();

// Each of the warp's 32 lanes passes a slot; `combine` sees them all once, then every lane continues.
void warp_meet(const char* instruction, void* slot, void (*combine)(void* const* slots));

// The thread resumes once `ready()`; `instruction` names where it waits.
void wait_until(const char* instruction, const std::function<bool()>& ready);

unsigned thread_index();
unsigned num_threads();

unsigned char* shared_memory();
size_t shared_size();
bool in_shared_memory(const void* pointer, size_t bytes);

void async_copy(void* target, const void* source, int bytes);
void async_commit();
void async_wait(int pending);

// `bytes` of memory that end at an unreadable page; 16-byte aligned. Freed with unfence.
void* fence(size_t bytes);
void unfence(void* pointer, size_t bytes);

}  // namespace emulator
