// Element types of the native core and their compute types.
//
// Plain structs: this header is shared by the C++ kernels, the CUDA sources and the bindings.
#pragma once

#include <cstdint>

namespace mmk {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Storage only: the bits of a bfloat16 or IEEE binary16. Arithmetic uses ComputeOf.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct ComputeTraits;
template <>
struct ComputeTraits<float> {
  using type = float;
  static constexpr DType dtype = DType::f32;
};
template <>
struct ComputeTraits<bf16> {
  using type = float;
  static constexpr DType dtype = DType::bf16;
};
template <>
struct ComputeTraits<f16> {
  using type = float;
  static constexpr DType dtype = DType::f16;
};
template <>
struct ComputeTraits<double> {
  using type = double;
  static constexpr DType dtype = DType::f64;
};

template <class T>
using ComputeOf = typename ComputeTraits<T>::type;

// Calls body(T{}) with the element type.
template <class Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    case DType::f64:
      return body(double{});
  }
}

}  // namespace mmk
