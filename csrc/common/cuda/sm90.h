// Tiles for TMA and wgmma on sm_90a: how they lie in shared memory, and what describes them to the tensor cores.
//
// A tile is rows of 128 bytes, 64 elements of 16 bits, with TMA's 128-byte swizzle: bits 4 .. 6 of an address are xored
// with its bits 7 .. 9. It starts at a multiple of 1024 bytes.
//
//   Major::k      [m or n][64 k]    a tile has any multiple of 8 rows
//   Major::outer  [k][64 m or n]    a tile has 64 of m or n and any multiple of 8 rows, the next follows behind it
//
// wgmma's accumulator of a warpgroup, [64, 8 NI]: acc[ni][e] of lane 4 g + t of warp w is row 16 w + g + 8 (e / 2),
// column 8 ni + 2 t + e % 2: each warp has 16 rows, and a row's fragments lie as those of mma.m16n8 (tile.h).
#pragma once

#include "common/cuda/sm90_atoms.h"

namespace mmk::cuda {

constexpr int kWarpgroup = 128;
constexpr int kSwizzleRow = 128;    // bytes
constexpr int kSwizzleTile = 1024;  // the pattern repeats after these bytes
constexpr int kSwizzleDepth = 64;   // 16-bit elements of a row

// The first multiple of 1024 bytes in dynamic shared memory: kernels ask for kSwizzleTile bytes more than they use.
__device__ __forceinline__ unsigned char* aligned_smem() {
  unsigned char* base = dynamic_smem();
  return base + (kSwizzleTile - smem_address(base) % kSwizzleTile) % kSwizzleTile;
}

// A value that a warp's lanes agree on, in a form in which the compiler knows that they do: without it, shuffles behind
// a branch on the value are compiled for diverged warps, too.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(kFullWarp, value, 0); }

// Slot and parity of a ring of kSlots barriers that is walked in order.
template <int kSlots>
struct Ring {
  int slot = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// ---- wgmma's descriptors --------------------------------------------------------------------------------------------
// Bits 0 .. 13 start, 16 .. 29 "leading" and 32 .. 45 "stride" offset, all in units of 16 bytes; 62 .. 63 swizzle (1:
// 128 bytes). Stride is from 8 rows to the next 8. Leading is for Major::outer, from one tile of 64 to the next.

// Of a tile of Major::k: the 8-row groups follow each other.
__device__ __forceinline__ uint64_t k_descriptor(const void* tile) {
  constexpr uint64_t kFixed = 1ull << 62 | static_cast<uint64_t>(kSwizzleTile >> 4) << 32 | 1ull << 16;
  return kFixed | (smem_address(tile) & 0x3ffff) >> 4;
}

// Of tiles of Major::outer, [kRows k, 64] each and one behind the other; a product reads 16 of the kRows.
template <int kRows = kSwizzleDepth>
__device__ __forceinline__ uint64_t outer_descriptor(const void* tile) {
  static_assert(kRows % 8 == 0, "whole groups of 8 rows");
  constexpr uint64_t kFixed = 1ull << 62 | static_cast<uint64_t>(kSwizzleTile >> 4) << 32 |
                              static_cast<uint64_t>(kRows * kSwizzleRow >> 4) << 16;
  return kFixed | (smem_address(tile) & 0x3ffff) >> 4;
}

template <Major kMajor>
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
  return kMajor == Major::k ? k_descriptor(tile) : outer_descriptor(tile);
}

// What 16 summed positions further on adds to a descriptor: 32 bytes of a row, or 16 rows.
template <Major kMajor>
constexpr uint64_t kDescriptorStep = (kMajor == Major::k ? 32 : 16 * kSwizzleRow) >> 4;

}  // namespace mmk::cuda
