// Replaces CUDA's header: the language's keywords and the built-ins that the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }

// Each rounded separately, never fused.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }

inline float __fdividef(float a, float b) { return a / b; }

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() {
  emulator::warp_meet("__syncwarp", nullptr, [](void* const*) {});
}

namespace emulator {
template <class T>
struct Exchange {
  T value;
  int bits;
  T result;
};
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  if (mask != 0xffffffffu) emulator::fail("shuffles of part of a warp are not emulated");
  emulator::Exchange<T> own{value, lane, T{}};
  emulator::warp_meet("__shfl_sync", &own, [](void* const* slots) {
    for (int i = 0; i < 32; ++i) {
      auto* slot = static_cast<emulator::Exchange<T>*>(slots[i]);
      slot->result = static_cast<emulator::Exchange<T>*>(slots[slot->bits])->value;
    }
  });
  return own.result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  if (mask != 0xffffffffu) emulator::fail("shuffles of part of a warp are not emulated");
  emulator::Exchange<T> own{value, bits, T{}};
  emulator::warp_meet("__shfl_xor_sync", &own, [](void* const* slots) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* slot = static_cast<emulator::Exchange<T>*>(slots[lane]);
      slot->result = static_cast<emulator::Exchange<T>*>(slots[lane ^ slot->bits])->value;
    }
  });
  return own.result;
}
