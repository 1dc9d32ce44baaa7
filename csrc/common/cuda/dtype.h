// The element types of the CUDA kernels.
#pragma once

#include "common/check.h"
#include "common/dtype.h"

namespace mmk::cuda {

// Calls run(T{}) with the element type, for kernels without float64; `family` names them in the error.
template <class Run>
void with_dtype(DType dtype, const char* family, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      return run(f16{});
    case DType::f64:
      fail(family, ": the CUDA kernels support float32, bfloat16 and float16");
  }
}

}  // namespace mmk::cuda
