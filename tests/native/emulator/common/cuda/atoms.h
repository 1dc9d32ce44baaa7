// The emulator's csrc/common/cuda/atoms.h: the same names, the semantics of the PTX manual, no PTX.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "async.h"
#include "common/dtype.h"

namespace mmk::cuda {

inline unsigned char* dynamic_smem() { return emulator::shared_memory(); }
inline uint32_t smem_address(const void* pointer) { return emulator::window_address(pointer); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float half_to_float(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa | 1024u), static_cast<int>(exponent) - 25);
  return sign != 0 ? -size : size;
}
inline float to_float(f16 x) {
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t bits = 0; bits < all.size(); ++bits) all[bits] = half_to_float(bits);
    return all;
  }();
  return table[x.bits];
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size == 0.f) return {sign};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);  // size = m 2^exponent, 0.5 <= m < 1
  const int last = exponent < -13 ? -24 : exponent - 11;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -last)));  // round to nearest even
  if (last == -24) return {static_cast<uint16_t>(sign | units)};
  return {static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(last + 24) << 10)))};
}

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 1.17549435e-38f ? 0.f : y;
}

inline void cp_async_16(void* shared, const void* global, int bytes) { emulator::async_copy(shared, global, bytes); }
inline void cp_async_commit() { emulator::async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulator::async_wait(kPending);
}

namespace emulated {

struct MatrixRows {
  const void* row;
  uint32_t* r;
};

template <bool kTransposed>
void ldmatrix(void* const* slots) {
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      const void* row = static_cast<MatrixRows*>(slots[8 * m + i])->row;
      if (!emulator::in_shared_memory(row, 16)) emulator::fail("ldmatrix reads outside shared memory");
      if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("ldmatrix: a row is not 16-byte aligned");
      std::memcpy(matrix[i], row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint16_t high = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<MatrixRows*>(slots[lane])->r[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t packed, int which) {
  return to_float(T{static_cast<uint16_t>(packed >> (16 * which))});
}

template <class T>
void mma(void* const* slots) {
  ++emulator::counts.matrix_products;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* slot = static_cast<Product*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * t + i] = half_of<T>(slot->a[0], i);
      a[g + 8][2 * t + i] = half_of<T>(slot->a[1], i);
      a[g][2 * t + 8 + i] = half_of<T>(slot->a[2], i);
      a[g + 8][2 * t + 8 + i] = half_of<T>(slot->a[3], i);
      b[2 * t + i][g] = half_of<T>(slot->b[0], i);
      b[2 * t + 8 + i][g] = half_of<T>(slot->b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* slot = static_cast<Product*>(slots[lane]);
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      float sum = slot->c[e];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      slot->c[e] = sum;
    }
  }
}

}  // namespace emulated

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulated::MatrixRows own{row, r};
  emulator::warp_meet("ldmatrix", &own, emulated::ldmatrix<false>);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulated::MatrixRows own{row, r};
  emulator::warp_meet("ldmatrix.trans", &own, emulated::ldmatrix<true>);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Product own{c, a, {b0, b1}};
  emulator::warp_meet("mma.m16n8k16", &own, emulated::mma<T>);
}

}  // namespace mmk::cuda
