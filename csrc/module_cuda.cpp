// Python bindings of the CUDA launchers. A separate file, so that the tests can bind the same launchers over emulated
// kernels.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "attention/attention.h"
#include "common/binding.h"
#include "contrastive/contrastive.h"
#include "packing/packing.h"

namespace py = pybind11;

namespace {

using mmk::PoolMode;
using mmk::Tensor;

// A CUDA stream as torch passes it: the handle as an integer.
struct Stream {
  void* handle;
};

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Stream> {
  PYBIND11_TYPE_CASTER(Stream, const_name("int"));

  bool load(handle source, bool) {
    if (!PyLong_Check(source.ptr())) return false;
    value.handle = PyLong_AsVoidPtr(source.ptr());
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail

namespace {

// Of the extras, the CUDA launchers take the pattern and the soft cap.
mmk::AttentionExtras extras_of(Tensor span_q, Tensor span_k, Tensor allow_q, Tensor bit_k, Tensor tiles,
                               double softcap) {
  mmk::AttentionExtras extras;
  extras.span_q = span_q, extras.span_k = span_k, extras.allow_q = allow_q, extras.bit_k = bit_k, extras.tiles = tiles;
  extras.softcap = softcap;
  return extras;
}

void bind_attention(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "launch_attention_fwd_cuda",
      [](Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor first_q, Tensor last_q, double scale, Tensor out,
         Tensor lse, Tensor span_q, Tensor span_k, Tensor allow_q, Tensor bit_k, Tensor tiles, double softcap,
         Stream stream) {
        const mmk::AttentionExtras extras = extras_of(span_q, span_k, allow_q, bit_k, tiles, softcap);
        mmk::launch_attention_fwd_cuda({q, k, v, {lo, hi, first_q, last_q}, scale, out, lse, extras}, stream.handle);
      },
      released);
  m.def(
      "launch_attention_bwd_cuda",
      [](Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lo, Tensor hi,
         Tensor first_q, Tensor last_q, double scale, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor span_q,
         Tensor span_k, Tensor allow_q, Tensor bit_k, Tensor tiles, double softcap, Stream stream) {
        const mmk::AttentionExtras extras = extras_of(span_q, span_k, allow_q, bit_k, tiles, softcap);
        mmk::launch_attention_bwd_cuda(
            {grad_out, grad_lse, q, k, v, out, lse, {lo, hi, first_q, last_q}, scale, dq, dk, dv, delta, extras},
            stream.handle);
      },
      released);
}

void bind_contrastive(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def("contrastive_infonce_fwd_workspace_cuda", &mmk::contrastive_infonce_fwd_workspace_cuda);
  m.def("contrastive_infonce_bwd_workspace_cuda", &mmk::contrastive_infonce_bwd_workspace_cuda);
  m.def("contrastive_siglip_fwd_workspace_cuda", &mmk::contrastive_siglip_fwd_workspace_cuda);
  m.def("contrastive_siglip_bwd_workspace_cuda", &mmk::contrastive_siglip_bwd_workspace_cuda);
  m.def(
      "launch_contrastive_infonce_fwd_cuda",
      [](Tensor queries, Tensor keys, Tensor logit_scale, Tensor loss, Tensor lse_q, Tensor lse_k, Tensor grad_scale,
         Tensor workspace, Stream stream) {
        mmk::launch_contrastive_infonce_fwd_cuda(queries, keys, logit_scale, loss, lse_q, lse_k, grad_scale, workspace,
                                                 stream.handle);
      },
      released);
  m.def(
      "launch_contrastive_infonce_bwd_cuda",
      [](Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor lse_q, Tensor lse_k, Tensor dqueries,
         Tensor dkeys, Tensor workspace, Stream stream) {
        mmk::launch_contrastive_infonce_bwd_cuda(grad_loss, queries, keys, logit_scale, lse_q, lse_k, dqueries, dkeys,
                                                 workspace, stream.handle);
      },
      released);
  m.def(
      "launch_contrastive_siglip_fwd_cuda",
      [](Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, Tensor loss, Tensor grad_scale,
         Tensor grad_bias, Tensor workspace, Stream stream) {
        mmk::launch_contrastive_siglip_fwd_cuda(queries, keys, logit_scale, logit_bias, loss, grad_scale, grad_bias,
                                                workspace, stream.handle);
      },
      released);
  m.def(
      "launch_contrastive_siglip_bwd_cuda",
      [](Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, Tensor dqueries,
         Tensor dkeys, Tensor workspace, Stream stream) {
        mmk::launch_contrastive_siglip_bwd_cuda(grad_loss, queries, keys, logit_scale, logit_bias, dqueries, dkeys,
                                                workspace, stream.handle);
      },
      released);
}

// PoolMode is passed as an integer, because module.cpp binds the enum.
void bind_packing(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "launch_packing_gather_fwd_cuda",
      [](Tensor first, Tensor second, Tensor third, Tensor fourth, Tensor index, Tensor out, Stream stream) {
        mmk::launch_packing_gather_fwd_cuda(first, second, third, fourth, index, out, stream.handle);
      },
      released);
  m.def(
      "launch_packing_patchify_fwd_cuda",
      [](Tensor x, Tensor grid, Tensor starts, int channels, int patch, int temporal, int merge, bool inverse,
         Tensor out, Stream stream) {
        mmk::launch_packing_patchify_fwd_cuda(x, grid, starts, channels, patch, temporal, merge, inverse, out,
                                              stream.handle);
      },
      released);
  m.def(
      "launch_packing_mrope_fwd_cuda",
      [](Tensor cu_seqlens, Tensor starts, Tensor extent, Tensor gained, Tensor out, Stream stream) {
        mmk::launch_packing_mrope_fwd_cuda(cu_seqlens, starts, extent, gained, out, stream.handle);
      },
      released);
  m.def(
      "launch_packing_weighted_pool_fwd_cuda",
      [](Tensor x, Tensor weights, Tensor cu_seqlens, Tensor out, Stream stream) {
        mmk::launch_packing_weighted_pool_fwd_cuda(x, weights, cu_seqlens, out, stream.handle);
      },
      released);
  m.def(
      "launch_packing_weighted_pool_bwd_cuda",
      [](Tensor grad_out, Tensor x, Tensor weights, Tensor cu_seqlens, Tensor grad_x, Tensor grad_weights,
         Stream stream) {
        mmk::launch_packing_weighted_pool_bwd_cuda(grad_out, x, weights, cu_seqlens, grad_x, grad_weights,
                                                   stream.handle);
      },
      released);
  m.def(
      "launch_packing_scatter_fwd_cuda",
      [](Tensor packed, Tensor index, Tensor order, Tensor starts, Tensor sums, Tensor out, Stream stream) {
        mmk::launch_packing_scatter_fwd_cuda(packed, index, order, starts, sums, out, stream.handle);
      },
      released);
  m.def(
      "launch_packing_segment_pool_fwd_cuda",
      [](Tensor x, Tensor cu_seqlens, int mode, Tensor out, Tensor argmax, Stream stream) {
        mmk::launch_packing_segment_pool_fwd_cuda(x, cu_seqlens, static_cast<PoolMode>(mode), out, argmax,
                                                  stream.handle);
      },
      released);
  m.def(
      "launch_packing_segment_pool_bwd_cuda",
      [](Tensor grad_out, Tensor cu_seqlens, Tensor argmax, int mode, Tensor grad_x, Stream stream) {
        mmk::launch_packing_segment_pool_bwd_cuda(grad_out, cu_seqlens, argmax, static_cast<PoolMode>(mode), grad_x,
                                                  stream.handle);
      },
      released);
}

}  // namespace

void mmk_bind_cuda(py::module_& m) {
  bind_attention(m);
  bind_contrastive(m);
  bind_packing(m);
}
