// A kernel that uses each atom of csrc/common/cuda/sm90_atoms.h once, correctly or with one mistake. The emulator must
// pass the correct one and fail the others; nvcc must compile it.
//
// out [64, 64] = bf16(bf16(A B) V) with A [64, 256], B [64, 256] (transposed), V [64, 64].
#pragma once

#include "common/cuda/sm90.h"

namespace mmk::cuda {

enum Mistake : int {
  none,
  wait_for_the_wrong_phase,
  overwrite_a_stage_in_use,
  expect_too_few_bytes,
  wrong_stride_offset,
  wrong_step,
  wrong_major,
  no_wgmma_fence,
  read_before_the_wait,
  release_before_the_wait,
  change_a_under_way,
  no_proxy_fence,
  no_barrier_before_the_store,
  forget_the_swizzle,
  no_barrier_init_fence,
  leave_with_a_store_in_flight,
  too_many_registers,
  kMistakes
};

struct ProbeParams {
  TensorMap a, b, v;  // boxes of [64, 64]
  TensorMap out;      // [1, 64, 64]
};

struct ProbeSmem {
  static constexpr int kTile = 64 * kSwizzleRow;
  static constexpr int stages = 0, v = 4 * kTile, out = 5 * kTile, barriers = 6 * kTile;
  static constexpr int bytes = kSwizzleTile + barriers + 64;
};

// A producer warpgroup, one that only releases its registers, and a consumer; a ring of two stages of A and B.
template <int kMistake>
__global__ void __launch_bounds__(3 * kWarpgroup, 1) sm90_probe_kernel(const __grid_constant__ ProbeParams p) {
  constexpr int kBlocks = 4, kTile = ProbeSmem::kTile;
  unsigned char* smem = aligned_smem();
  Barrier* full = reinterpret_cast<Barrier*>(smem + ProbeSmem::barriers);
  Barrier *empty = full + 2, *v_full = full + 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], 4);
    barrier_init(v_full, 1);
    if (kMistake != no_barrier_init_fence) fence_barrier_init();
  }
  __syncthreads();
  Ring<2> ring;
  if (threadIdx.x < 2 * kWarpgroup) {
    if (kMistake != too_many_registers) give_registers<40>();
    if (threadIdx.x != 0) return;
    barrier_arrive_expect(v_full, kTile);
    tma_load(smem + ProbeSmem::v, p.v, v_full, 0, 0);
    for (int block = 0; block < kBlocks; ++block, ring.next()) {
      if (kMistake != overwrite_a_stage_in_use) barrier_wait(&empty[ring.slot], ring.parity ^ 1);
      barrier_arrive_expect(&full[ring.slot], kMistake == expect_too_few_bytes ? kTile : 2 * kTile);
      tma_load(smem + 2 * ring.slot * kTile, p.a, &full[ring.slot], block * 64, 0);
      tma_load(smem + (2 * ring.slot + 1) * kTile, p.b, &full[ring.slot], block * 64, 0);
    }
    return;
  }

  take_registers<232>();
  const int thread = threadIdx.x % kWarpgroup;
  float s[8][4], o[8][4];
  for (int block = 0; block < kBlocks; ++block, ring.next()) {
    barrier_wait(&full[ring.slot], kMistake == wait_for_the_wrong_phase ? ring.parity ^ 1 : ring.parity);
    uint64_t a = descriptor<Major::k>(smem + 2 * ring.slot * kTile);
    const uint64_t b = descriptor<Major::k>(smem + (2 * ring.slot + 1) * kTile);
    if (kMistake == wrong_stride_offset) a ^= (64ull ^ 32ull) << 32;
    constexpr uint64_t kStep = kMistake == wrong_step ? 1 : kDescriptorStep<Major::k>;
    if (kMistake != no_wgmma_fence) wgmma_fence();
    for (int i = 0; i < 4; ++i) wgmma<bf16, Major::k, Major::k>(s, a + i * kStep, b + i * kStep, block > 0 || i > 0);
    wgmma_commit();
    if (kMistake == release_before_the_wait && thread % kWarp == 0) barrier_arrive(&empty[ring.slot]);
    if (kMistake != read_before_the_wait) wgmma_wait<0>();
    if (kMistake != release_before_the_wait && thread % kWarp == 0) barrier_arrive(&empty[ring.slot]);
  }
  accumulator_ready(s);
  uint32_t probabilities[4][4];
  for (int i = 0; i < 4; ++i) {
    for (int r = 0; r < 4; ++r) {
      probabilities[i][r] = pack2<bf16>(s[2 * i + r / 2][r % 2 * 2], s[2 * i + r / 2][r % 2 * 2 + 1]);
    }
  }
  if (kMistake == read_before_the_wait) wgmma_wait<0>();

  barrier_wait(v_full, 0);
  constexpr Major kMajorV = kMistake == wrong_major ? Major::k : Major::outer;
  const uint64_t v = descriptor<Major::outer>(smem + ProbeSmem::v);
  wgmma_fence();
  for (int i = 0; i < 4; ++i) {
    wgmma<bf16, kMajorV>(o, probabilities[i], v + i * kDescriptorStep<Major::outer>, i > 0);
  }
  wgmma_commit();
  if (kMistake == change_a_under_way) probabilities[0][0] ^= 0x8000u;
  wgmma_wait<0>();
  accumulator_ready(o);

  // Lanes trade halves so that each writes 16 bytes of a row: of eight columns, lane t has 2 t and 2 t + 1.
  unsigned char* out = smem + ProbeSmem::out;
  for (int ni = 0; ni < 8; ++ni) {
    for (int r = 0; r < 2; ++r) {
      uint32_t part[4];
      const uint32_t own = pack2<bf16>(o[ni][2 * r], o[ni][2 * r + 1]);
      for (int t = 0; t < 4; ++t)
        part[t] = __shfl_sync(kFullWarp, own, static_cast<int>(threadIdx.x % kWarp / 4 * 4 + t));
      if (threadIdx.x % 4 != 0) continue;
      const int row = thread / kWarp * 16 + fragment_row(2 * r);
      const int chunk = kMistake == forget_the_swizzle ? ni : ni ^ row % 8;
      store_shared_16(out + row * kSwizzleRow + 16 * chunk, {part[0], part[1], part[2], part[3]});
    }
  }
  if (kMistake != no_proxy_fence) fence_async_proxy();
  if (kMistake != no_barrier_before_the_store) named_sync(1, kWarpgroup);
  if (thread != 0) return;
  tma_store(p.out, out, 0, 0, 0);
  tma_store_commit();
  if (kMistake != leave_with_a_store_in_flight) tma_store_wait_read();
}

}  // namespace mmk::cuda
