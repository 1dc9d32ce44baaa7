// How Python hands a tensor to the core: a tuple (data pointer, dtype code, sizes, strides), see
// mmkernels/runtime/native.py. None becomes a tensor with given() == false.
#pragma once

#include <pybind11/pybind11.h>

#include "common/check.h"
#include "common/tensor.h"

namespace pybind11::detail {

// The last dimension of every tensor must be contiguous. Kernels read vectors by their pointer alone, so that a stride
// which a caller forgot would be other memory.
inline void expect_unit_stride(const mmk::Tensor& x) {
  int64_t elements = 1;
  for (int i = 0; i < x.ndim; ++i) elements *= x.size[i];
  if (x.ndim == 0 || elements == 0 || x.size[x.ndim - 1] == 1) return;
  MMK_CHECK(x.stride[x.ndim - 1] == 1, "expected a contiguous last dimension, got stride ", x.stride[x.ndim - 1],
            " for size ", x.size[x.ndim - 1]);
}

template <>
struct type_caster<mmk::Tensor> {
  PYBIND11_TYPE_CASTER(mmk::Tensor, const_name("mmkernels.runtime.native.View | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto field = [&](int i) { return PyTuple_GET_ITEM(source.ptr(), i); };
    value.data = PyLong_AsVoidPtr(field(0));
    value.dtype = static_cast<mmk::DType>(PyLong_AsLong(field(1)));
    value.ndim = static_cast<int>(PyTuple_GET_SIZE(field(2)));
    if (value.ndim > mmk::Tensor::kMaxDims) return false;
    for (int i = 0; i < value.ndim; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(field(2), i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(field(3), i));
    }
    if (PyErr_Occurred()) return false;
    expect_unit_stride(value);
    return true;
  }
};

}  // namespace pybind11::detail
