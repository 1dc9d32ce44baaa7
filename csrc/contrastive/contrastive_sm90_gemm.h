// The product behind every contrastive kernel for sm_90a: C [128, 256] = A B, by a block of one producer and two
// consumer warpgroups. The producer's first thread fetches A and B with TMA, 64 of k at a time, into a ring of four
// stages. Each consumer multiplies its 64 rows of A with all of B by wgmma and runs the kernel's epilogue on the result
// while the other consumer multiplies.
#pragma once

#include "common/cuda/sm90.h"
#include "common/cuda/tensor_map.h"
#include "contrastive/contrastive_sm90.h"

namespace mmk::cuda::sm90 {

constexpr int kRows = 2 * kSm90Rows, kColumns = kSm90Columns;
constexpr int kNI = kColumns / 8;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kConsumerWarps = 8;
constexpr int kStages = 4;
constexpr int kBytesA = kRows * kSwizzleRow, kBytesB = kColumns * kSwizzleRow;
constexpr int kStageBytes = kBytesA + kBytesB;  // 48 KB
constexpr int kHalfBytes = kSm90Rows * kSwizzleRow;

using Accumulator = float[kNI][4];

// Registers per thread: 128 * 24 + 256 * 240 of 65536.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// Named barriers.
constexpr int kLeadBarrier = 1, kConsumerBarrier = 2, kJoinBarrier = 4;

// Aligned shared memory: the ring, then the barriers, then each consumer's `Extra`.
template <class Extra>
struct Smem {
  static constexpr int barriers = kStages * kStageBytes;
  static constexpr int extra = barriers + 256;
  static constexpr int bytes = kSwizzleTile + extra + 2 * static_cast<int>(sizeof(Extra));
  static_assert(bytes <= 227 * 1024, "what a block may have");
};

// A thread's view of the ring.
struct Pipeline {
  unsigned char* stages;
  Barrier *full, *empty;
  Ring<kStages> ring;

  __device__ __forceinline__ explicit Pipeline(unsigned char* smem)
      : stages(smem), full(reinterpret_cast<Barrier*>(smem + kStages * kStageBytes)), empty(full + kStages) {}

  // Called by the whole block; ends with a barrier.
  __device__ __forceinline__ void init() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&full[i], 1);
        barrier_init(&empty[i], kConsumerWarps);
      }
      fence_barrier_init();
    }
    __syncthreads();
  }

  __device__ __forceinline__ unsigned char* stage() const { return stages + ring.slot * kStageBytes; }
};

// One operand of a tile to fetch, starting at row or column `outer`; `map` has boxes of [64 k, rows] for Major::k or
// [64 m or n, 64 k] for Major::outer.
template <Major kMajor, int kOuter>
__device__ __forceinline__ void fetch(unsigned char* target, const TensorMap& map, Barrier* full, int outer, int k) {
  if constexpr (kMajor == Major::k) {
    tma_load(target, map, full, k, outer);
  } else {
#pragma unroll
    for (int i = 0; i < kOuter; i += kSwizzleDepth) tma_load(target + i * kSwizzleRow, map, full, outer + i, k);
  }
}

// The producer's work for one tile, by one thread.
template <Major kMajorA, Major kMajorB>
__device__ __forceinline__ void produce(Pipeline& p, const TensorMap& a, int m0, const TensorMap& b, int n0,
                                        int depth) {
  for (int k = 0; k < depth; k += kSwizzleDepth, p.ring.next()) {
    Barrier* full = &p.full[p.ring.slot];
    barrier_wait(&p.empty[p.ring.slot], p.ring.parity ^ 1);
    barrier_arrive_expect(full, kStageBytes);
    fetch<kMajorA, kRows>(p.stage(), a, full, m0, k);
    fetch<kMajorB, kColumns>(p.stage() + kBytesA, b, full, n0, k);
  }
}

// A consumer warpgroup. The first starts a few stages before the second and stays ahead, because both need the tensor
// cores equally long. So one runs its epilogue while the other multiplies.
struct Consumer {
  static constexpr int kLead = kStages - 1;  // not more, because the second must release the stages too
  int index;                                 // 0 or 1
  int lead = kLead;

  __device__ __forceinline__ Consumer() : index(warp_uniform(threadIdx.x / kWarpgroup - 1)) {
    if (index == 1) named_sync(kLeadBarrier, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void step() {
    if (index == 0 && lead > 0 && --lead == 0) named_arrive(kLeadBarrier, 2 * kWarpgroup);
  }
  // After the last tile: releases the second, which must not wait for a lead that will not come.
  __device__ __forceinline__ void finish() {
    if (index == 0 && lead > 0) named_arrive(kLeadBarrier, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void sync() const { named_sync(kConsumerBarrier + index, kWarpgroup); }
};

// acc = A B for this consumer's 64 rows.
template <class T, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void multiply(Accumulator& acc, Pipeline& p, Consumer& consumer, int depth) {
  int previous = 0;
  const auto release = [&](int slot) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(&p.empty[slot]);
  };
#pragma unroll 1
  for (int k = 0; k < depth; k += kSwizzleDepth, p.ring.next()) {
    barrier_wait(&p.full[p.ring.slot], p.ring.parity);
    const uint64_t a = descriptor<kMajorA>(p.stage() + consumer.index * kHalfBytes);
    const uint64_t b = descriptor<kMajorB>(p.stage() + kBytesA);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSwizzleDepth / 16; ++i) {
      wgmma<T, kMajorA, kMajorB>(acc, a + i * kDescriptorStep<kMajorA>, b + i * kDescriptorStep<kMajorB>,
                                 k > 0 || i > 0);
    }
    wgmma_commit();
    if (k > 0) {
      wgmma_wait<1>();
      release(previous);
    }
    previous = p.ring.slot;
    consumer.step();
  }
  wgmma_wait<0>();
  accumulator_ready(acc);
  release(previous);
}

// The position of a warp's 16 x 256 part of a tile in the similarity matrix, for this thread: element (r, ni, c) is row
// `row` + 8 r, column `column` + 8 ni + c. Comparisons are with constants to save registers.
struct Part {
  int row, column;
  int rows, columns;  // in bounds from there on
  bool whole;         // for the warp: no element is out of bounds or positive

  __device__ __forceinline__ Part(int row0, int column0, int n, int m)
      : row(row0 + threadIdx.x % kWarp / 4),
        column(column0 + threadIdx.x % 4 * 2),
        rows(n - row),
        columns(m - column),
        whole(row0 + 16 <= n && column0 + kColumns <= m && (row0 + 16 <= column0 || column0 + kColumns <= row0)) {}

  __device__ __forceinline__ bool has_row(int r) const { return 8 * r < rows; }
  __device__ __forceinline__ bool has(int r, int ni, int c) const { return 8 * r < rows && 8 * ni + c < columns; }
  __device__ __forceinline__ bool positive(int r, int ni, int c) const { return 8 * (ni - r) + c == row - column; }
  // Whether one of this thread's elements of row r is an in-bounds positive.
  __device__ __forceinline__ bool has_positive(int r) const {
    const int distance = row - column + 8 * r;
    return distance >= 0 && distance < kColumns && distance % 8 < 2 && distance < columns && has_row(r);
  }
};

// First row of this warp inside the block's tile.
__device__ __forceinline__ int first_row(const Consumer& consumer) {
  return consumer.index * kSm90Rows + warp_uniform(threadIdx.x % kWarpgroup / kWarp) * 16;
}

// A reduction step over a warp's rows: two lanes hold sums of two column groups and keep one group each.
template <int kLane>
__device__ __forceinline__ void exchange(float (&low)[4], const float (&high)[4]) {
  const bool upper = (threadIdx.x & kLane) != 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float kept = upper ? high[e] : low[e], given = upper ? low[e] : high[e];
    low[e] = kept + __shfl_xor_sync(kFullWarp, given, kLane);
  }
}

// Sums over a warp's 16 rows. make(ni) writes to acc[ni] four values of this lane's two columns, over its two rows.
// Afterwards acc[i], i < 4, holds the warp's sums for the eight columns whose ni this lane `owns`. Values are summed as
// soon as they are available, which saves registers.
template <class Make>
__device__ __forceinline__ void sum_columns(Accumulator& acc, const Make& make) {
#pragma unroll
  for (int i = 0; i < kNI / 8; ++i) {
#pragma unroll
    for (int j = i; j < kNI / 4; j += kNI / 8) {
#pragma unroll
      for (int k = j; k < kNI / 2; k += kNI / 4) {
        make(k);
        make(k + kNI / 2);
        exchange<16>(acc[k], acc[k + kNI / 2]);
      }
      exchange<8>(acc[j], acc[j + kNI / 4]);
    }
    exchange<4>(acc[i], acc[i + kNI / 8]);
  }
}
constexpr int kOwn = kNI / 8;

// Layout in which warps exchange column sums in shared memory, [2 kOwn][lane]: column pair i, first or second. Lanes
// write contiguously.
__device__ __forceinline__ int place_of(int i, int c, int lane) { return (2 * i + c) * kWarp + lane; }
__device__ __forceinline__ int column_at(int place) {
  const int i = place / (2 * kWarp), c = place / kWarp % 2, lane = place % kWarp;
  return (lane / 16 * (kNI / 2) + lane / 8 % 2 * (kNI / 4) + lane / 4 % 2 * kOwn + i) * 8 + lane % 4 * 2 + c;
}
// Whether this lane writes the columns of ni.
__device__ __forceinline__ bool owns(int ni) {
  const int lane = threadIdx.x % kWarp;
  return lane / 4 == (ni / (kNI / 2) * 4 + ni / (kNI / 4) % 2 * 2 + ni / kOwn % 2);
}

// Host: a box over rows of features, [kRows or kColumns rows, 64] for Major::k, [64, 64] for Major::outer.
inline TensorMap rows_map(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  return tensor_map(dtype, {2, data, {columns, rows, 1}, {1, stride, 0}, {kSwizzleDepth, box_rows, 1}});
}
inline TensorMap rows_map(const Tensor& x, int box_rows) {
  return rows_map(x.dtype, x.data, x.size[0], x.size[1], x.stride[0], box_rows);
}

}  // namespace mmk::cuda::sm90
