// Contrastive losses on CPU: launchers that run an epilogue over the tile engine.
#include "contrastive/contrastive.h"

#include "contrastive/search.h"
#include "contrastive/sigmoid.h"
#include "contrastive/softmax_forward.h"
#include "contrastive/softmax_gradient.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <class T>
Rows<T> rows_of(const Tensor& t) {
  return {t.ptr<const T>(), t.size[0], t.size[1], t.stride[0]};
}

const double* numbers(const Tensor& t) { return t.given() ? t.ptr<const double>() : nullptr; }

PairRule rule_of(const PairArguments& pairs, const GuideArguments& guide = {}) {
  return {pairs.targets.given() ? pairs.targets.ptr<const int64_t>() : nullptr,
          pairs.query_ids.given() ? pairs.query_ids.ptr<const int32_t>() : nullptr,
          pairs.key_ids.given() ? pairs.key_ids.ptr<const int32_t>() : nullptr, pairs.ignore,
          numbers(guide.thresholds)};
}

// 0, 1, 2, ...: in the plain losses the positive of query i is key i.
class OwnTargets {
 public:
  explicit OwnTargets(int64_t n) : targets_(n) {
    for (int64_t i = 0; i < n; ++i) targets_.data()[i] = i;
  }
  PairRule rule() const { return {targets_.data(), nullptr, nullptr, false}; }

 private:
  AlignedBuffer<int64_t> targets_;
};

template <class T>
void zero(const Tensor& gradient) {
  for (int64_t i = 0; gradient.given() && i < gradient.size[0] * gradient.size[1]; ++i) gradient.ptr<T>()[i] = T{};
}

// The second product of a softmax: the teacher's or the guide's, if either is given.
template <class T>
class SecondProduct {
 public:
  SecondProduct(const TeacherArguments& teacher, const GuideArguments& guide)
      : given_(teacher.queries.given() || guide.queries.given()),
        operands_(guide.queries.given() ? Operands<T>{rows_of<T>(guide.queries), rows_of<T>(guide.keys)}
                                        : Operands<T>{rows_of<T>(teacher.queries), rows_of<T>(teacher.keys)}) {}
  const Operands<T>* operands() const { return given_ ? &operands_ : nullptr; }

 private:
  bool given_;
  Operands<T> operands_;
};

// ---- softmax --------------------------------------------------------------------------------------------------------

// Whether features have lower precision than the compute type.
template <class T>
constexpr bool kLowPrecision = sizeof(T) < sizeof(ComputeOf<T>);

template <class T>
void statistics(const Operands<T>& student, const Operands<T>* teacher, const TeacherLse& teacher_lse,
                ComputeOf<T> scale, const PairRule& rule, bool totals, bool columns, double* of_rows,
                double* of_columns, int threads) {
  const Pairs<ComputeOf<T>> pairs(rule, student.y.count);
  SoftmaxForward<TileOf<T>> epilogue(student.x.count, student.y.count, scale, pairs, teacher_lse, totals, columns,
                                     kLowPrecision<T>, threads);
  for_each_tile(student, teacher, threads, epilogue);
  epilogue.finish(of_rows, of_columns);
}

void softmax_fwd(const SoftmaxForwardArguments& a, int threads) {
  with_dtype(a.queries.dtype, [&](auto t) {
    using T = decltype(t);
    const Operands<T> student{rows_of<T>(a.queries), rows_of<T>(a.keys)};
    const SecondProduct<T> second(a.teacher, a.guide);
    statistics<T>(student, second.operands(), {numbers(a.teacher.lse_q), numbers(a.teacher.lse_k)},
                  *a.logit_scale.ptr<ComputeOf<T>>(), rule_of(a.pairs, a.guide), a.totals, a.columns,
                  a.rows_out.ptr<double>(), a.columns_out.ptr<double>(), threads);
  });
}

template <class T>
void softmax_gradients(const Operands<T>& student, const Operands<T>* teacher, const Line& rows, const Line& columns,
                       ComputeOf<T> scale, const PairRule& rule, const Tensor& dqueries, const Tensor& dkeys,
                       int threads) {
  if (student.x.count == 0 || student.y.count == 0) {
    zero<T>(dqueries);
    zero<T>(dkeys);
    return;
  }
  const Pairs<ComputeOf<T>> pairs(rule, student.y.count);
  const SoftmaxGradient<TileOf<T>> epilogue(rows, columns, scale, pairs, kLowPrecision<T>);
  feature_gradients(student, teacher, dqueries.ptr<T>(), dkeys.ptr<T>(), ComputeOf<T>{1}, threads, epilogue);
}

void softmax_bwd(const SoftmaxBackwardArguments& a, int threads) {
  with_dtype(a.queries.dtype, [&](auto t) {
    using T = decltype(t);
    const Operands<T> student{rows_of<T>(a.queries), rows_of<T>(a.keys)};
    const SecondProduct<T> second(a.teacher, a.guide);
    const Line rows{numbers(a.coefficients_q), numbers(a.lse_q), numbers(a.teacher.lse_q), student.x.count};
    const Line columns{numbers(a.coefficients_k), numbers(a.lse_k), numbers(a.teacher.lse_k),
                       a.columns ? student.y.count : 0};
    softmax_gradients<T>(student, second.operands(), rows, columns, *a.logit_scale.ptr<ComputeOf<T>>(),
                         rule_of(a.pairs, a.guide), a.dqueries, a.dkeys, threads);
  });
}

// InfoNCE, both directions of N pairs.
void infonce_fwd(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& loss,
                 const Tensor& lse_q, const Tensor& lse_k, const Tensor& grad_scale, int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using T = decltype(t);
    using C = ComputeOf<T>;
    const Operands<T> student{rows_of<T>(queries), rows_of<T>(keys)};
    const int64_t n = student.x.count;
    const C scale = *logit_scale.ptr<C>();
    double total = 0, slope = 0;
    if (n > 0) {
      AlignedBuffer<double> row_data(kStatistics * n), column_data(kStatistics * n);
      const StatisticLines rows{row_data.data(), n}, columns{column_data.data(), n};
      const OwnTargets own(n);
      statistics<T>(student, nullptr, {}, scale, own.rule(), false, true, rows.data, columns.data, threads);
      for (const StatisticLines& of : {rows, columns})
        for (int64_t i = 0; i < n; ++i) {
          total += of.at(kLse, i) - scale * of.at(kPositive, i);
          slope += of.at(kMean, i) - of.at(kPositive, i);
        }
      for (int64_t i = 0; i < n; ++i) {
        lse_q.ptr<double>()[i] = rows.at(kLse, i);
        lse_k.ptr<double>()[i] = columns.at(kLse, i);
      }
      total /= 2.0 * n;
      slope /= 2.0 * n;
    }
    *loss.ptr<C>() = static_cast<C>(total);
    *grad_scale.ptr<C>() = static_cast<C>(slope);
  });
}

void infonce_bwd(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                 const Tensor& lse_q, const Tensor& lse_k, const Tensor& dqueries, const Tensor& dkeys, int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using T = decltype(t);
    using C = ComputeOf<T>;
    const Operands<T> student{rows_of<T>(queries), rows_of<T>(keys)};
    const int64_t n = student.x.count;
    const C scale = *logit_scale.ptr<C>();
    const double weight = *grad_loss.ptr<C>() / (2.0 * static_cast<double>(n > 0 ? n : 1));
    AlignedBuffer<double> data(kCoefficients * n);
    const StatisticLines coefficients{data.data(), n};
    for (int64_t i = 0; i < n; ++i) {
      coefficients.at(kLse, i) = weight;
      coefficients.at(kPositive, i) = -scale * weight;
      coefficients.at(kTotal, i) = coefficients.at(kTeacher, i) = 0;
    }
    const OwnTargets own(n);
    softmax_gradients<T>(student, nullptr, {coefficients.data, numbers(lse_q), nullptr, n},
                         {coefficients.data, numbers(lse_k), nullptr, n}, scale, own.rule(), dqueries, dkeys, threads);
  });
}

// ---- sigmoid --------------------------------------------------------------------------------------------------------

template <class T>
void sigmoid_sums(const Operands<T>& student, ComputeOf<T> scale, ComputeOf<T> bias, const PairRule& rule, double* sums,
                  int threads) {
  const Pairs<ComputeOf<T>> pairs(rule, student.y.count);
  SigmoidForward<TileOf<T>> epilogue(student.x.count, scale, bias, pairs);
  for_each_tile<T>(student, nullptr, threads, epilogue);
  epilogue.finish(sums);
}

void sigmoid_fwd(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& logit_bias,
                 const PairArguments& pairs, const Tensor& sums, int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using T = decltype(t);
    using C = ComputeOf<T>;
    sigmoid_sums<T>({rows_of<T>(queries), rows_of<T>(keys)}, *logit_scale.ptr<C>(), *logit_bias.ptr<C>(),
                    rule_of(pairs), sums.ptr<double>(), threads);
  });
}

template <class T>
void sigmoid_gradients(double grad, const Tensor& queries, const Tensor& keys, ComputeOf<T> scale, ComputeOf<T> bias,
                       const PairRule& rule, const Tensor& dqueries, const Tensor& dkeys, int threads) {
  const Operands<T> student{rows_of<T>(queries), rows_of<T>(keys)};
  if (student.x.count == 0 || student.y.count == 0) {
    zero<T>(dqueries);
    zero<T>(dkeys);
    return;
  }
  const Pairs<ComputeOf<T>> pairs(rule, student.y.count);
  const SigmoidGradient<TileOf<T>> epilogue(scale, bias, pairs);
  feature_gradients<T>(student, nullptr, dqueries.ptr<T>(), dkeys.ptr<T>(), static_cast<ComputeOf<T>>(grad * scale),
                       threads, epilogue);
}

void sigmoid_bwd(const Tensor& grad_sum, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                 const Tensor& logit_bias, const PairArguments& pairs, const Tensor& dqueries, const Tensor& dkeys,
                 int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using C = ComputeOf<decltype(t)>;
    sigmoid_gradients<decltype(t)>(*grad_sum.ptr<double>(), queries, keys, *logit_scale.ptr<C>(), *logit_bias.ptr<C>(),
                                   rule_of(pairs), dqueries, dkeys, threads);
  });
}

// SigLIP of N pairs.
void siglip_fwd(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& logit_bias,
                const Tensor& loss, const Tensor& grad_scale, const Tensor& grad_bias, int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using T = decltype(t);
    using C = ComputeOf<T>;
    const Operands<T> student{rows_of<T>(queries), rows_of<T>(keys)};
    const OwnTargets own(student.x.count);
    double sums[3];
    sigmoid_sums<T>(student, *logit_scale.ptr<C>(), *logit_bias.ptr<C>(), own.rule(), sums, threads);
    const double n = static_cast<double>(student.x.count > 0 ? student.x.count : 1);
    *loss.ptr<C>() = static_cast<C>(sums[0] / n);
    *grad_scale.ptr<C>() = static_cast<C>(sums[1] / n);
    *grad_bias.ptr<C>() = static_cast<C>(sums[2] / n);
  });
}

void siglip_bwd(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                const Tensor& logit_bias, const Tensor& dqueries, const Tensor& dkeys, int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using C = ComputeOf<decltype(t)>;
    const int64_t n = queries.size[0];
    const OwnTargets own(n);
    sigmoid_gradients<decltype(t)>(*grad_loss.ptr<C>() / static_cast<double>(n > 0 ? n : 1), queries, keys,
                                   *logit_scale.ptr<C>(), *logit_bias.ptr<C>(), own.rule(), dqueries, dkeys, threads);
  });
}

// ---- retrieval ------------------------------------------------------------------------------------------------------

void sample_fwd(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& seed,
                const PairArguments& pairs, const Tensor& index, int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using T = decltype(t);
    using C = ComputeOf<T>;
    const Operands<T> student{rows_of<T>(queries), rows_of<T>(keys)};
    const Pairs<C> rule(rule_of(pairs), student.y.count);
    SampleForward<TileOf<T>> epilogue(student.x.count, *logit_scale.ptr<C>(), seed.ptr<const int64_t>(), rule,
                                      index.ptr<int64_t>());
    for_each_tile<T>(student, nullptr, threads, epilogue);
  });
}

void topk_fwd(const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& indices, int threads) {
  with_dtype(queries.dtype, [&](auto t) {
    using T = decltype(t);
    const Operands<T> student{rows_of<T>(queries), rows_of<T>(keys)};
    TopKForward<TileOf<T>> epilogue(values.size[1], values.ptr<ComputeOf<T>>(), indices.ptr<int64_t>());
    for_each_tile<T>(student, nullptr, threads, epilogue);
  });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(ContrastiveKernels, contrastive) = {
    &MMK_ISA::softmax_fwd, &MMK_ISA::softmax_bwd, &MMK_ISA::sigmoid_fwd, &MMK_ISA::sigmoid_bwd, &MMK_ISA::infonce_fwd,
    &MMK_ISA::infonce_bwd, &MMK_ISA::siglip_fwd,  &MMK_ISA::siglip_bwd,  &MMK_ISA::sample_fwd,  &MMK_ISA::topk_fwd};

}  // namespace mmk
