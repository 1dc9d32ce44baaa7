// Python bindings of all launchers; the CUDA ones are in module_cuda.cpp. Every launcher releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/additive.h"
#include "attention/attention.h"
#include "attention/gate.h"
#include "attention/rope.h"
#include "common/binding.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/simd/peak.h"
#include "common/tensor.h"
#include "contrastive/contrastive.h"
#include "packing/packing.h"
#include "packing/planner.h"

namespace py = pybind11;

#ifdef MMK_HAVE_CUDA
void mmk_bind_cuda(py::module_& m);  // module_cuda.cpp
#endif

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// The instruction set in use, those compiled, and those of them that this processor supports. If the environment
// requests an unavailable set, none is in use, and why_no_cpu_isa holds the error that every CPU launcher raises.
void add_isas(py::dict& info) {
  py::list compiled, usable;
  for (const char* const* isa = mmk::compiled_isas(); *isa; ++isa) compiled.append(*isa);
  info["cpu_isas"] = compiled;
  info["usable_cpu_isas"] = usable;
  info["cpu_isa"] = py::none();
  info["why_no_cpu_isa"] = py::none();
  try {
    for (const char* const* isa = mmk::compiled_isas(); *isa; ++isa)
      if (mmk::isa_supported(*isa)) usable.append(*isa);
    info["cpu_isa"] = mmk::cpu_isa();
  } catch (const std::invalid_argument& error) {
    info["why_no_cpu_isa"] = error.what();
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = MMK_VERSION;
  info["compiler"] = __VERSION__;
  add_isas(info);
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
#ifdef MMK_HAVE_CUDA
  info["cuda_version"] = MMK_CUDA_VERSION;
  info["cuda_archs"] = split(MMK_CUDA_ARCHS, ',');
#else
  info["cuda_version"] = py::none();
  info["cuda_archs"] = std::vector<std::string>{};
#endif
  return info;
}

// A launcher that looks up its kernel when called: if the environment requests an unavailable instruction set, the call
// raises rather than the import.
template <typename Struct, typename... Args>
auto launcher(const Struct& (*kernels)(), void (*Struct::*kernel)(Args...)) {
  return [=](Args... args) { (kernels().*kernel)(args...); };
}

void bind_attention(py::module_& m) {
  using mmk::Tensor;
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "launch_attention_fwd_cpu",
      [](Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor first_q, Tensor last_q, double scale, Tensor out,
         Tensor lse, Tensor span_q, Tensor span_k, Tensor allow_q, Tensor bit_k, Tensor tiles, Tensor class_q,
         Tensor class_k, Tensor pair_bias, Tensor row_sums, Tensor sink, Tensor seed, Tensor at_q, Tensor slopes,
         Tensor distance_sums, Tensor row_max, double dropout_p, double softcap, int num_threads) {
        const mmk::AttentionExtras extras = {span_q,  span_k,        allow_q,  bit_k,     tiles,  class_q,
                                             class_k, pair_bias,     row_sums, sink,      seed,   at_q,
                                             slopes,  distance_sums, row_max,  dropout_p, softcap};
        mmk::attention_kernels().forward({q, k, v, {lo, hi, first_q, last_q}, scale, out, lse, extras}, num_threads);
      },
      released);
  m.def(
      "launch_attention_bwd_cpu",
      [](Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lo, Tensor hi,
         Tensor first_q, Tensor last_q, double scale, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor span_q,
         Tensor span_k, Tensor allow_q, Tensor bit_k, Tensor tiles, Tensor class_q, Tensor class_k, Tensor pair_bias,
         Tensor row_sums, Tensor sink, Tensor seed, Tensor at_q, Tensor slopes, Tensor distance_sums, double dropout_p,
         double softcap, int num_threads) {
        const mmk::AttentionExtras extras = {span_q,  span_k,        allow_q,  bit_k,     tiles,  class_q,
                                             class_k, pair_bias,     row_sums, sink,      seed,   at_q,
                                             slopes,  distance_sums, {},       dropout_p, softcap};
        mmk::attention_kernels().backward(
            {grad_out, grad_lse, q, k, v, out, lse, {lo, hi, first_q, last_q}, scale, dq, dk, dv, delta, extras},
            num_threads);
      },
      released);
}

void bind_attention_rows(py::module_& m) {
  using mmk::Norm;
  using mmk::Tensor;
  const py::call_guard<py::gil_scoped_release> released;
  py::enum_<Norm>(m, "Norm").value("none", Norm::none).value("rms", Norm::rms).value("layer", Norm::layer);
  m.def(
      "launch_attention_norm_rope_fwd_cpu",
      [](Tensor x, Tensor cos, Tensor sin, Tensor weight, Tensor bias, Tensor y, Norm norm, double eps,
         bool interleaved, int num_threads) {
        mmk::rope_kernels().forward({x, cos, sin, weight, bias, y, norm, eps, interleaved}, num_threads);
      },
      released);
  m.def(
      "launch_attention_norm_rope_bwd_cpu",
      [](Tensor grad_out, Tensor x, Tensor cos, Tensor sin, Tensor weight, Tensor dx, Tensor dweight, Tensor dbias,
         Norm norm, double eps, bool interleaved, int num_threads) {
        mmk::rope_kernels().backward({grad_out, x, cos, sin, weight, dx, dweight, dbias, norm, eps, interleaved},
                                     num_threads);
      },
      released);
  m.def(
      "launch_attention_gated_residual_fwd_cpu",
      [](Tensor residual, Tensor x, Tensor gate, bool by_column, Tensor out, int num_threads) {
        mmk::gate_kernels().forward({residual, x, gate, by_column, out}, num_threads);
      },
      released);
  m.def(
      "launch_attention_gated_residual_bwd_cpu",
      [](Tensor grad_out, Tensor x, Tensor gate, bool by_column, Tensor dx, Tensor dgate, int num_threads) {
        mmk::gate_kernels().backward({grad_out, x, gate, by_column, dx, dgate}, num_threads);
      },
      released);
}

void bind_attention_additive(py::module_& m) {
  using mmk::Tensor;
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "launch_attention_additive_fwd_cpu",
      [](Tensor q, Tensor k, Tensor v, Tensor w, Tensor bias, Tensor lo, Tensor hi, Tensor first_q, Tensor last_q,
         Tensor span_q, Tensor span_k, Tensor allow_q, Tensor bit_k, Tensor out, Tensor lse, int num_threads) {
        const mmk::AdditiveMask mask{lo, hi, first_q, last_q, span_q, span_k, allow_q, bit_k};
        mmk::additive_kernels().forward({q, k, v, w, bias, mask, out, lse}, num_threads);
      },
      released);
  m.def(
      "launch_attention_additive_bwd_cpu",
      [](Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor w, Tensor bias, Tensor out, Tensor lse,
         Tensor lo, Tensor hi, Tensor first_q, Tensor last_q, Tensor span_q, Tensor span_k, Tensor allow_q,
         Tensor bit_k, Tensor dq, Tensor dk, Tensor dv, Tensor dw, int num_threads) {
        const mmk::AdditiveMask mask{lo, hi, first_q, last_q, span_q, span_k, allow_q, bit_k};
        mmk::additive_kernels().backward({grad_out, grad_lse, q, k, v, w, bias, out, lse, mask, dq, dk, dv, dw},
                                         num_threads);
      },
      released);
}

void bind_contrastive(py::module_& m) {
  using mmk::Tensor, mmk::ContrastiveKernels;
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "launch_contrastive_softmax_fwd_cpu",
      [](Tensor queries, Tensor keys, Tensor logit_scale, Tensor targets, Tensor query_ids, Tensor key_ids, bool ignore,
         Tensor teacher_queries, Tensor teacher_keys, Tensor teacher_lse_q, Tensor teacher_lse_k, Tensor guide_queries,
         Tensor guide_keys, Tensor thresholds, bool totals, bool columns, Tensor rows_out, Tensor columns_out,
         int num_threads) {
        mmk::contrastive_kernels().softmax_fwd({queries,
                                                keys,
                                                logit_scale,
                                                {targets, query_ids, key_ids, ignore},
                                                {teacher_queries, teacher_keys, teacher_lse_q, teacher_lse_k},
                                                {guide_queries, guide_keys, thresholds},
                                                totals,
                                                columns,
                                                rows_out,
                                                columns_out},
                                               num_threads);
      },
      released);
  m.def(
      "launch_contrastive_softmax_bwd_cpu",
      [](Tensor coefficients_q, Tensor coefficients_k, Tensor lse_q, Tensor lse_k, Tensor queries, Tensor keys,
         Tensor logit_scale, Tensor targets, Tensor query_ids, Tensor key_ids, bool ignore, Tensor teacher_queries,
         Tensor teacher_keys, Tensor teacher_lse_q, Tensor teacher_lse_k, Tensor guide_queries, Tensor guide_keys,
         Tensor thresholds, bool columns, Tensor dqueries, Tensor dkeys, int num_threads) {
        mmk::contrastive_kernels().softmax_bwd({coefficients_q,
                                                coefficients_k,
                                                lse_q,
                                                lse_k,
                                                queries,
                                                keys,
                                                logit_scale,
                                                {targets, query_ids, key_ids, ignore},
                                                {teacher_queries, teacher_keys, teacher_lse_q, teacher_lse_k},
                                                {guide_queries, guide_keys, thresholds},
                                                columns,
                                                dqueries,
                                                dkeys},
                                               num_threads);
      },
      released);
  m.def(
      "launch_contrastive_sigmoid_fwd_cpu",
      [](Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, Tensor targets, Tensor query_ids,
         Tensor key_ids, Tensor sums, int num_threads) {
        mmk::contrastive_kernels().sigmoid_fwd(queries, keys, logit_scale, logit_bias,
                                               {targets, query_ids, key_ids, false}, sums, num_threads);
      },
      released);
  m.def(
      "launch_contrastive_sigmoid_bwd_cpu",
      [](Tensor grad_sum, Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, Tensor targets,
         Tensor query_ids, Tensor key_ids, Tensor dqueries, Tensor dkeys, int num_threads) {
        mmk::contrastive_kernels().sigmoid_bwd(grad_sum, queries, keys, logit_scale, logit_bias,
                                               {targets, query_ids, key_ids, false}, dqueries, dkeys, num_threads);
      },
      released);
  m.def(
      "launch_contrastive_sample_fwd_cpu",
      [](Tensor queries, Tensor keys, Tensor logit_scale, Tensor seed, Tensor targets, Tensor query_ids, Tensor key_ids,
         Tensor index, int num_threads) {
        mmk::contrastive_kernels().sample_fwd(queries, keys, logit_scale, seed, {targets, query_ids, key_ids, false},
                                              index, num_threads);
      },
      released);
  m.def("launch_contrastive_infonce_fwd_cpu", launcher(mmk::contrastive_kernels, &ContrastiveKernels::infonce_fwd),
        released);
  m.def("launch_contrastive_infonce_bwd_cpu", launcher(mmk::contrastive_kernels, &ContrastiveKernels::infonce_bwd),
        released);
  m.def("launch_contrastive_siglip_fwd_cpu", launcher(mmk::contrastive_kernels, &ContrastiveKernels::siglip_fwd),
        released);
  m.def("launch_contrastive_siglip_bwd_cpu", launcher(mmk::contrastive_kernels, &ContrastiveKernels::siglip_bwd),
        released);
  m.def("launch_contrastive_topk_fwd_cpu", launcher(mmk::contrastive_kernels, &ContrastiveKernels::topk_fwd), released);
}

// Moves a vector into a NumPy array that owns it.
py::array_t<int64_t> to_numpy(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

using Lengths = py::array_t<int64_t, py::array::c_style>;

py::tuple to_tuple(mmk::Plan&& plan) {
  return py::make_tuple(to_numpy(std::move(plan.offsets)), to_numpy(std::move(plan.items)));
}

// The planner's functions: (lengths, images or None, capacity, max_images, max_samples, ...).
mmk::Items items_of(const Lengths& lengths, const std::optional<Lengths>& images) {
  MMK_CHECK(!images || images->size() == lengths.size(), "expected as many images as lengths, got ", images->size());
  return {lengths.data(), images ? images->data() : nullptr, static_cast<int64_t>(lengths.size())};
}

void bind_planner(py::module_& m) {
  using Images = std::optional<Lengths>;
  const auto planner = [&m](const char* name, mmk::Plan (*make)(mmk::Items, mmk::Caps)) {
    m.def(name, [make](const Lengths& lengths, const Images& images, int64_t capacity, int64_t max_images,
                       int64_t max_samples) {
      const mmk::Items items = items_of(lengths, images);
      mmk::Plan plan;
      {
        py::gil_scoped_release release;
        plan = make(items, {capacity, max_images, max_samples});
      }
      return to_tuple(std::move(plan));
    });
  };
  planner("plan_best_fit", &mmk::plan_best_fit);
  planner("plan_next_fit", &mmk::plan_next_fit);
  m.def("plan_subset_sum", [](const Lengths& lengths, const Images& images, int64_t capacity, int64_t max_images,
                              int64_t max_samples, int64_t lookahead) {
    const mmk::Items items = items_of(lengths, images);
    mmk::Plan plan;
    {
      py::gil_scoped_release release;
      plan = mmk::plan_subset_sum(items, {capacity, max_images, max_samples}, lookahead);
    }
    return to_tuple(std::move(plan));
  });
  m.def("fullest_pack",
        [](const Lengths& lengths, const Images& images, int64_t capacity, int64_t max_images, int64_t max_samples) {
          return to_numpy(mmk::fullest_pack(items_of(lengths, images), {capacity, max_images, max_samples}));
        });
  m.def("plan_histogram",
        [](const Lengths& lengths, const Images& images, int64_t capacity, int64_t max_images, int64_t max_samples) {
          const mmk::Items items = items_of(lengths, images);
          mmk::CountedPlan counted;
          {
            py::gil_scoped_release release;
            counted = mmk::plan_histogram(items, {capacity, max_images, max_samples});
          }
          return py::make_tuple(to_numpy(std::move(counted.steps)), counted.packs);
        });
  m.def("list_histogram", [](const Lengths& lengths, const Images& images, const Lengths& steps, int64_t packs) {
    const mmk::Items items = items_of(lengths, images);
    const mmk::CountedPlan counted{{steps.data(), steps.data() + steps.size()}, packs};
    mmk::Plan plan;
    {
      py::gil_scoped_release release;
      plan = mmk::list_histogram(items, counted);
    }
    return to_tuple(std::move(plan));
  });
  // (steps, packs, a copy of the lengths in a narrow type if they fit), or None if a length is out of [0, capacity].
  m.def("count_and_plan", [](const Lengths& lengths, int64_t capacity, int64_t max_samples) -> py::object {
    const auto run = [&](auto copy) -> py::object {
      const int64_t* data = lengths.data();
      const int64_t n = lengths.size();
      auto* copied = copy.mutable_data();
      bool good;
      mmk::CountedPlan counted;
      {
        py::gil_scoped_release release;
        std::vector<int64_t> counts(capacity + 1);
        good = mmk::count_lengths(data, n, capacity, counts.data(), copied);
        if (good) counted = mmk::plan_counts(counts.data(), {capacity, mmk::kNoCap, max_samples});
      }
      if (!good) return py::none();
      return py::make_tuple(to_numpy(std::move(counted.steps)), counted.packs, copy);
    };
    if (capacity <= UINT16_MAX) return run(py::array_t<uint16_t>(lengths.size()));
    return run(py::array_t<int64_t>(lengths.size()));
  });
}

void bind_packing(py::module_& m) {
  using mmk::PackingKernels, mmk::PoolingKernels, mmk::PoolMode;
  py::enum_<PoolMode>(m, "PoolMode")
      .value("sum", PoolMode::sum)
      .value("mean", PoolMode::mean)
      .value("max", PoolMode::max)
      .value("first", PoolMode::first);

  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("launch_packing_gather_fwd_cpu", launcher(mmk::packing_kernels, &PackingKernels::gather_fwd), no_gil);
  m.def("launch_packing_scatter_fwd_cpu", launcher(mmk::packing_kernels, &PackingKernels::scatter_fwd), no_gil);
  m.def("launch_packing_patchify_fwd_cpu", launcher(mmk::packing_kernels, &PackingKernels::patchify_fwd), no_gil);
  m.def("launch_packing_patchify_images_fwd_cpu", launcher(mmk::packing_kernels, &PackingKernels::patchify_images_fwd),
        no_gil);
  m.def("launch_packing_mrope_fwd_cpu", launcher(mmk::packing_kernels, &PackingKernels::mrope_fwd), no_gil);
  m.def("launch_packing_segment_pool_fwd_cpu", launcher(mmk::pooling_kernels, &PoolingKernels::segment_pool_fwd),
        no_gil);
  m.def("launch_packing_segment_pool_bwd_cpu", launcher(mmk::pooling_kernels, &PoolingKernels::segment_pool_bwd),
        no_gil);
  m.def("launch_packing_weighted_pool_fwd_cpu", launcher(mmk::pooling_kernels, &PoolingKernels::weighted_pool_fwd),
        no_gil);
  m.def("launch_packing_weighted_pool_bwd_cpu", launcher(mmk::pooling_kernels, &PoolingKernels::weighted_pool_bwd),
        no_gil);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The native core of mmkernels: CPU and CUDA kernels over plain pointers.";
  m.def("build_info", &build_info);
  m.def(
      "measure_peak",
      [](int dtype, int threads, double seconds) {
        return mmk::measure_fma_peak(static_cast<mmk::DType>(dtype), threads, seconds);
      },
      py::arg("dtype"), py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "Flop/s of register-only multiply-adds on this machine: the ceiling that benches report fractions of.");
  bind_attention(m);
  bind_attention_rows(m);
  bind_attention_additive(m);
  bind_contrastive(m);
  bind_packing(m);
  bind_planner(m);
#ifdef MMK_HAVE_CUDA
  mmk_bind_cuda(m);
#endif
}
