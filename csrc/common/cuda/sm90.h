// Tiles for TMA and wgmma on sm_90a: shared-memory layout and wgmma descriptors.
//
// A tile is rows of 128 bytes, 64 elements of 16 bits, with TMA's 128-byte swizzle: bits 4 .. 6 of an address are xored
// with its bits 7 .. 9. It starts at a multiple of 1024 bytes.
//
//   Major::k      [m or n][64 k]    a tile has a multiple of 8 rows
//   Major::outer  [k][64 m or n]    a tile has 64 of m or n and a multiple of 8 rows; the next tile follows it
//
// wgmma's accumulator of a warpgroup, [64, 8 NI]: acc[ni][e] of lane 4 g + t of warp w is row 16 w + g + 8 (e / 2),
// column 8 ni + 2 t + e % 2: each warp has 16 rows, with fragments laid out as in mma.m16n8 (tile.h).
#pragma once

#include "common/cuda/sm90_atoms.h"

namespace mmk::cuda {

constexpr int kWarpgroup = 128;
constexpr int kSwizzleRow = 128;    // bytes
constexpr int kSwizzleTile = 1024;  // the pattern repeats after these bytes
constexpr int kSwizzleDepth = 64;   // 16-bit elements of a row

// Dynamic shared memory aligned to 1024 bytes; kernels request kSwizzleTile extra bytes for it.
__device__ __forceinline__ unsigned char* aligned_smem() {
  unsigned char* base = dynamic_smem();
  return base + (kSwizzleTile - smem_address(base) % kSwizzleTile) % kSwizzleTile;
}

// Tells the compiler that a value is warp-uniform. Otherwise shuffles after a branch on it are also compiled for
// diverged warps.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(kFullWarp, value, 0); }

// Slot and parity in a ring of kSlots barriers used in order.
template <int kSlots>
struct Ring {
  int slot = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// ---- wgmma's descriptors --------------------------------------------------------------------------------------------
// Bits 0 .. 13 start, 16 .. 29 "leading" and 32 .. 45 "stride" offset, all in units of 16 bytes; 62 .. 63 swizzle (1:
// 128 bytes). Stride: between groups of 8 rows. Leading: for Major::outer, between tiles of 64.

// Descriptor of a Major::k tile: the 8-row groups are consecutive.
__device__ __forceinline__ uint64_t k_descriptor(const void* tile) {
  constexpr uint64_t kFixed = 1ull << 62 | static_cast<uint64_t>(kSwizzleTile >> 4) << 32 | 1ull << 16;
  return kFixed | (smem_address(tile) & 0x3ffff) >> 4;
}

// Descriptor of consecutive Major::outer tiles, [kRows k, 64] each; a product reads 16 of the kRows.
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

// Descriptor increment for the next 16 of k: 32 bytes of a row, or 16 rows.
template <Major kMajor>
constexpr uint64_t kDescriptorStep = (kMajor == Major::k ? 32 : 16 * kSwizzleRow) >> 4;

}  // namespace mmk::cuda
