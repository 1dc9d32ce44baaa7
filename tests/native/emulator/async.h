// The asynchronous machinery of sm_90a: mbarriers, TMA, wgmma, proxies, named barriers, registers.
//
// Nothing asynchronous happens when it is issued. TMA copies and warpgroup products wait in queues, from which the
// scheduler takes them at random times drawn from the seed: copies in any order, products in order; without a seed,
// copies at the next round and products when a thread waits for them. To expose mistakes:
//   - the target of a TMA load is NaN from its issue to its completion; an accumulator is NaN from wgmma to the wait
//   - TMA and wgmma see shared memory through a copy of it (the async proxy): written by TMA, and by a thread's
//     store_shared_16 only once that thread has executed fence.proxy.async; everything else reads as NaN
//   - operands are read when a product runs, wherever its descriptor points: start, leading and stride offset, swizzle
//   - errors: a barrier not initialised, or not made visible to TMA; more arrivals than a phase expects; a box, address
//     or descriptor that is misaligned or outside shared memory; lanes of a warpgroup with different descriptors; wgmma
//     without wgmma.fence; registers of A changed during a product; work in flight, or bytes unaccounted for, when a
//     block ends; more registers than there are
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Called by the scheduler: before a block; between rounds (returns whether anything happened, which `now` forces);
// after a block.
void begin_async(unsigned threads, uint64_t seed);
bool step_async(bool now);
void end_async();

// A pointer's address in the block's shared memory window: aligned to 128, not to 1024.
uint32_t window_address(const void* pointer);

void barrier_init(void* barrier, int arrivals);
void barrier_publish();
void barrier_arrive(void* barrier, int expected_bytes);
void barrier_wait(void* barrier, int parity);

// As the driver encodes it: 16-bit elements, the innermost dimension a swizzled row of up to 64.
struct TensorBox {
  int rank;
  unsigned char* data;
  int64_t size[3], stride[3];  // elements
  int box[3];
};
void tma_load(void* shared, const TensorBox& tensor, void* barrier, int x, int y, int z);
void tma_store(const TensorBox& tensor, const void* shared, int x, int y, int z);
void tma_store_commit();
void tma_store_wait();
void store_shared_16(void* shared, const void* value);
void publish_stores();

// One thread's part of a product acc [64, columns] (+)= A [64, 16] B [16, columns].
struct WarpgroupProduct {
  float* acc;         // [columns / 2] registers
  const uint32_t* a;  // [4] registers, or null: descriptor
  uint64_t a_descriptor, b_descriptor;
  bool a_outer, b_outer, add;
  int columns;
  float (*to_float)(uint16_t bits);

  bool same(const WarpgroupProduct& o) const {
    return (a == nullptr) == (o.a == nullptr) && a_descriptor == o.a_descriptor && b_descriptor == o.b_descriptor &&
           a_outer == o.a_outer && b_outer == o.b_outer && add == o.add && columns == o.columns;
  }
};
void wgmma_fence();
void wgmma(const WarpgroupProduct& product);
void wgmma_commit();
void wgmma_wait(int pending);

void set_registers(int count, bool more);
void named_barrier(int id, int threads, bool wait);

}  // namespace emulator
