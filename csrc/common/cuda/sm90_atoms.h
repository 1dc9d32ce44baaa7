// Thin wrappers of single sm_90a instructions; sm90.h combines them.
//
// No clusters are used: shared::cluster addresses are the block's own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/atoms.h"
#include "common/cuda/tile.h"

namespace mmk::cuda {

// The opaque 128 bytes of a CUtensorMap; made by tensor_map.h, passed in a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// ---- mbarriers ------------------------------------------------------------------------------------------------------
// A phase completes when the initialised number of arrivals and all expected bytes have arrived. wait(parity) returns
// when the phase of that parity has completed; the first phase has parity 0, and wait(1) on a fresh barrier returns at
// once.

struct Barrier {
  uint64_t state;
};

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

// Called by the initialising thread before the block's first barrier: makes the mbarriers visible to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(smem_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// ---- TMA ------------------------------------------------------------------------------------------------------------
// Called by one thread. Coordinates are elements, innermost first. Out-of-bounds elements are zeros and count as bytes.

__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          smem_address(shared)),
      "l"(&map), "r"(smem_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(smem_address(shared)),
      "l"(&map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Out-of-bounds elements are not written. Reads what was written before the writers' last fence_async_proxy.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(smem_address(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read shared memory. (Global visibility comes with the end of the grid.)
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Writes 16 bytes for TMA or wgmma, visible to them after fence_async_proxy and a barrier.
__device__ __forceinline__ void store_shared_16(void* shared, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(shared)), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Orders this thread's writes to shared memory before later reads by TMA and wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- wgmma ----------------------------------------------------------------------------------------------------------
// Called by all 128 threads of a warpgroup:
//   wgmma_fence()    before the first product of a group; makes earlier register writes visible to the products
//   wgmma<...>(...)  products, executed asynchronously and in order
//   wgmma_commit()   closes a group
//   wgmma_wait<n>()  until at most n groups are pending; then accumulator_ready(acc) for each finished accumulator
// Between wgmma and accumulator_ready, do not touch the accumulator, A's registers, or the operands' memory.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulator reads before the wait.
template <int NI>
__device__ __forceinline__ void accumulator_ready(float (&acc)[NI][4]) {
#pragma unroll
  for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(acc[ni][e])::"memory");
  }
}

#define MMK_ACC_1(i) "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])
#define MMK_ACC_4(i) MMK_ACC_1(i), MMK_ACC_1(i + 1), MMK_ACC_1(i + 2), MMK_ACC_1(i + 3)
#define MMK_ACC_8(i) MMK_ACC_4(i), MMK_ACC_4(i + 4)
#define MMK_ACC_16(i) MMK_ACC_8(i), MMK_ACC_8(i + 8)
#define MMK_ACC_32(i) MMK_ACC_16(i), MMK_ACC_16(i + 16)
#define MMK_REGS_8                                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, "                                                                                                          \
  "%25, %26, %27, %28, %29, %30, %31"
#define MMK_REGS_16                                                                                                  \
  MMK_REGS_8                                                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MMK_REGS_32                                                                                                    \
  MMK_REGS_16                                                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "   \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "   \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

// acc (+)= A [64, 16] B [16, 8 NI], both in shared memory. `add` false starts a new sum.
template <class T, Major kA, Major kB, int NI>
__device__ __forceinline__ void wgmma(float (&acc)[NI][4], uint64_t a, uint64_t b, bool add) {
  static_assert(NI == 8 || NI == 16 || NI == 32, "8 NI columns");
#define MMK_WGMMA(N, REGS, ACC, A, B, ADD, TA, TB, TYPE)                                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" REGS "}, %" A ", %" B ", p, 1, 1, %" TA ", %" TB ";\n}"                                \
               : ACC                                                                                                \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kA == Major::outer), "n"(kB == Major::outer))
#define MMK_WGMMA_SIZES(TYPE)                                                              \
  if constexpr (NI == 8) {                                                                 \
    MMK_WGMMA("64", MMK_REGS_8, MMK_ACC_8(0), "32", "33", "34", "35", "36", TYPE);         \
  } else if constexpr (NI == 16) {                                                         \
    MMK_WGMMA("128", MMK_REGS_16, MMK_ACC_16(0), "64", "65", "66", "67", "68", TYPE);      \
  } else {                                                                                 \
    MMK_WGMMA("256", MMK_REGS_32, MMK_ACC_32(0), "128", "129", "130", "131", "132", TYPE); \
  }
  if constexpr (ComputeTraits<T>::dtype == DType::bf16) {
    MMK_WGMMA_SIZES("bf16")
  } else {
    static_assert(ComputeTraits<T>::dtype == DType::f16, "16-bit elements");
    MMK_WGMMA_SIZES("f16")
  }
#undef MMK_WGMMA_SIZES
#undef MMK_WGMMA
}

// The same with A [64, 16] from registers.
template <class T, Major kB, int NI>
__device__ __forceinline__ void wgmma(float (&acc)[NI][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(NI == 8 || NI == 16, "8 NI columns");
#define MMK_WGMMA(N, REGS, ACC, A, B, ADD, TB, TYPE)                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" REGS "}, {" A "}, %" B ", p, 1, 1, %" TB ";\n}"                                        \
               : ACC                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),                    \
                 "n"(kB == Major::outer))
#define MMK_WGMMA_SIZES(TYPE)                                                                   \
  if constexpr (NI == 8) {                                                                      \
    MMK_WGMMA("64", MMK_REGS_8, MMK_ACC_8(0), "%32, %33, %34, %35", "36", "37", "38", TYPE);    \
  } else {                                                                                      \
    MMK_WGMMA("128", MMK_REGS_16, MMK_ACC_16(0), "%64, %65, %66, %67", "68", "69", "70", TYPE); \
  }
  if constexpr (ComputeTraits<T>::dtype == DType::bf16) {
    MMK_WGMMA_SIZES("bf16")
  } else {
    static_assert(ComputeTraits<T>::dtype == DType::f16, "16-bit elements");
    MMK_WGMMA_SIZES("f16")
  }
#undef MMK_WGMMA_SIZES
#undef MMK_WGMMA
}

// ---- warps with different work --------------------------------------------------------------------------------------

// Sets registers per thread (a multiple of 8), called by all warps of a warpgroup: producers release, consumers take.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Barrier `id` (1 .. 15; 0 is __syncthreads) of `threads` threads in whole warps; sync waits, arrive does not.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace mmk::cuda
