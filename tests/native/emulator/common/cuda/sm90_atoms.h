// The emulator's csrc/common/cuda/sm90_atoms.h: the same names; async.h describes their behaviour.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/atoms.h"
#include "common/cuda/tile.h"

namespace mmk::cuda {

struct TensorMap {
  emulator::TensorBox box;
};

struct Barrier {
  uint64_t state;
};

inline void barrier_init(Barrier* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() { emulator::barrier_publish(); }
inline void barrier_arrive(Barrier* barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(Barrier* barrier, int bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_wait(Barrier* barrier, int parity) { emulator::barrier_wait(barrier, parity); }

inline void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int x, int y) {
  if (map.box.rank != 2) emulator::fail("TMA: two coordinates for a tensor of another rank");
  emulator::tma_load(shared, map.box, barrier, x, y, 0);
}
inline void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z) {
  if (map.box.rank != 3) emulator::fail("TMA: three coordinates for a tensor of another rank");
  emulator::tma_load(shared, map.box, barrier, x, y, z);
}
inline void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  if (map.box.rank != 3) emulator::fail("TMA: three coordinates for a tensor of another rank");
  emulator::tma_store(map.box, shared, x, y, z);
}
inline void tma_store_commit() { emulator::tma_store_commit(); }
inline void tma_store_wait_read() { emulator::tma_store_wait(); }
inline void store_shared_16(void* shared, uint4 value) { emulator::store_shared_16(shared, &value); }
inline void fence_async_proxy() { emulator::publish_stores(); }

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int NI>
void accumulator_ready(float (&)[NI][4]) {}

namespace emulated {
template <class T>
float to_float_bits(uint16_t bits) {
  return to_float(T{bits});
}
}  // namespace emulated

template <class T, Major kA, Major kB, int NI>
void wgmma(float (&acc)[NI][4], uint64_t a, uint64_t b, bool add) {
  static_assert(NI == 8 || NI == 16 || NI == 32, "8 NI columns");
  emulator::wgmma(
      {&acc[0][0], nullptr, a, b, kA == Major::outer, kB == Major::outer, add, 8 * NI, emulated::to_float_bits<T>});
}

template <class T, Major kB, int NI>
void wgmma(float (&acc)[NI][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(NI == 8 || NI == 16, "8 NI columns");
  emulator::wgmma({&acc[0][0], a, 0, b, false, kB == Major::outer, add, 8 * NI, emulated::to_float_bits<T>});
}

template <int kCount>
void give_registers() {
  emulator::set_registers(kCount, false);
}
template <int kCount>
void take_registers() {
  emulator::set_registers(kCount, true);
}

inline void named_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
inline void named_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }

}  // namespace mmk::cuda
