// Contrastive losses on CPU: the epilogues of the tile engine, and the loss from their statistics.
//
// A logit is rounded once, the same way wherever it is used, so that the difference from a maximum (or an lse that one
// logit dominates) is exact; the exponential is the natural one, without a product with log2(e) at the logit's size.
// Sums within a tile are short and in the features' compute type; those over tiles and over rows are in double. An lse
// is handed from forward to backward as a double and subtracted in two parts.
#include "contrastive/contrastive.h"

#include "common/simd/math.h"
#include "contrastive/tiles.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <class T>
Rows<T> rows_of(const Tensor& t) {
  return {t.ptr<const T>(), t.size[0], t.size[1], t.stride[0]};
}

double natural_log(double x) { return log2(splat(x))[0] * FloatTraits<double>::ln2; }
double natural_exp(double x) { return exp(splat(x))[0]; }

// scale * similarity, rounded: a compiler that fused the product into a later difference would make it inexact.
template <class V, class E>
MMK_INLINE V logits(V similarity, E scale) {
  V logit = similarity * scale;
#if defined(__AVX512F__)
  asm("" : "+v"(logit));
#elif defined(__AVX2__)
  asm("" : "+x"(logit));
#elif defined(__aarch64__)
  asm("" : "+w"(logit));
#endif
  return logit;
}

// 0, 1, 2, ... in the integer lanes that belong to C.
template <class C>
MMK_INLINE Vec<typename IntOf<C>::type> lane_numbers() {
  Vec<typename IntOf<C>::type> lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = i;
  return lane;
}

// Calls body(offset, in) for each vector of a row of `count` elements, where the mask `in` says which lanes exist.
template <class C, class Body>
MMK_INLINE void for_each_vector(int64_t count, Body body) {
  using Int = typename IntOf<C>::type;
  const auto lane = lane_numbers<C>();
  for (int64_t v = 0; v < count; v += kLanes<C>) body(v, lane < static_cast<Int>(min64(count - v, kLanes<C>)));
}

// The similarity of each pair ahead of the tiles: products of the diagonal blocks by the same GEMM, so with the same
// bits as the diagonal of S.
template <class T>
void pair_similarities(const Rows<T>& x, const Rows<T>& y, int threads, ComputeOf<T>* pairs) {
  const int64_t blocks = ceil_div(x.count, kTileRows), workers = usable_threads(blocks, threads);
  const int64_t a_size = packed_size_a<T>(kTileRows, x.width), b_size = packed_size_b<T>(kTileRows, x.width);
  AlignedBuffer<Packed<T>> a(workers * a_size), b(workers * b_size);
  AlignedBuffer<ComputeOf<T>> s(workers * kTileRows * kTileRows);
  parallel_for(blocks, threads, [&](int64_t block, int thread) {
    const int64_t i0 = block * kTileRows, rows = min64(x.count - i0, kTileRows);
    Packed<T>*own_a = a.data() + thread * a_size, *own_b = b.data() + thread * b_size;
    ComputeOf<T>* own_s = s.data() + thread * kTileRows * kTileRows;
    pack_a<T>(x.row(i0), x.stride, 1, rows, x.width, own_a);
    pack_b<T>(y.row(i0), y.stride, 1, rows, x.width, own_b);
    gemm_packed<T>(rows, rows, x.width, own_a, own_b, own_s, kTileRows, false);
    for (int64_t r = 0; r < rows; ++r) pairs[i0 + r] = own_s[r * kTileRows + r];
  });
}

// ---- InfoNCE --------------------------------------------------------------------------------------------------------

// Online softmax of rows (or columns): the largest logit m, sum exp(s - m) without the pair, and
// sum exp(s - m) * (similarity - that of the pair). The derivative by the scale is the mean of the last over the whole
// sum; taking the pair's off first keeps it accurate when the pair has nearly all of the mass.
template <class C>
struct SoftmaxStats {
  C *max, *sum, *dot;

  SoftmaxStats at(int64_t i) const { return {max + i, sum + i, dot + i}; }
};

template <class C>
class SoftmaxStatsBuffer {
 public:
  explicit SoftmaxStatsBuffer(int64_t count) : count_(count), data_(3 * count) {}
  SoftmaxStats<C> stats() const { return {data_.data(), data_.data() + count_, data_.data() + 2 * count_}; }

 private:
  int64_t count_;
  AlignedBuffer<C> data_;
};

// Forward epilogue: statistics of rows and columns from the same tile. A row tile updates its rows' running statistics
// and leaves the columns' statistics over its 96 rows in `partial`; finish_columns merges these in the order of tiles.
template <class T>
class InfoNCEForward {
  using C = ComputeOf<T>;
  static constexpr int L = kLanes<C>;

 public:
  InfoNCEForward(const Rows<T>& x, const Rows<T>& y, C scale, int threads)
      : n_(x.count),
        tiles_(ceil_div(x.count, kTileRows)),
        scale_(scale),
        threads_(threads),
        pairs_(n_ + L),
        rows_(x.count),
        columns_(y.count),
        partial_(tiles_ * kPassCols) {
    pair_similarities(x, y, threads, pairs_.data());
    const SoftmaxStats<double> row = rows_.stats();
    for (int64_t i = 0; i < n_; ++i) {
      row.max[i] = -FloatTraits<double>::infinity;
      row.sum[i] = row.dot[i] = 0;
    }
  }

  void tile(int64_t t, const Tile<T>& tile) const {
    const SoftmaxStats<C> column = partial_.stats().at(t * kPassCols + tile.j0 % kPassCols);
    C shift[kTileRows];
    raise_maxima(tile, column.max, shift);
    for (int64_t v = 0; v < tile.cols; v += L) {
      store(column.sum + v, Vec<C>{});
      store(column.dot + v, Vec<C>{});
    }
    if (tile.i0 < tile.j0 + tile.cols && tile.j0 < tile.i0 + tile.rows)
      add_tile<true>(tile, shift, column);
    else
      add_tile<false>(tile, shift, column);
  }

  void finish_columns(int64_t j0, int64_t cols) const {
    const SoftmaxStats<C> partial = partial_.stats();
    const SoftmaxStats<double> column = columns_.stats().at(j0);
    parallel_chunks(cols, threads_, [&](int64_t begin, int64_t end, int) {
      for (int64_t c = begin; c < end; ++c) column.max[c] = partial.max[c], column.sum[c] = column.dot[c] = 0;
      for (int64_t t = 1; t < tiles_; ++t)
        for (int64_t c = begin; c < end; ++c) {
          const double of_tile = partial.max[t * kPassCols + c];
          column.max[c] = of_tile > column.max[c] ? of_tile : column.max[c];
        }
      for (int64_t t = 0; t < tiles_; ++t)
        for (int64_t c = begin; c < end; c += L) {
          const SoftmaxStats<C> of_tile = partial.at(t * kPassCols + c);
          C weight[L];
          for (int64_t i = 0; i < L; ++i) weight[i] = c + i < end ? of_tile.max[i] - column.max[c + i] : 0;
          store(weight, exp(load(weight)));
          for (int64_t i = 0; i < min64(end - c, L); ++i) {
            column.sum[c + i] += static_cast<double>(weight[i]) * of_tile.sum[i];
            column.dot[c + i] += static_cast<double>(weight[i]) * of_tile.dot[i];
          }
        }
    });
  }

  // lse of both directions; adds up the loss and its derivative with respect to the scale, all times 2 N.
  void finish(double* lse_q, double* lse_k, double* loss, double* grad_scale) const {
    *loss = *grad_scale = 0;
    finish_direction(rows_.stats(), lse_q, loss, grad_scale);
    finish_direction(columns_.stats(), lse_k, loss, grad_scale);
  }

 private:
  static constexpr int kGroup = 8;  // rows at a time: their sums stay in registers, and the columns' sums are short

  template <bool kDiagonal>
  void add_tile(const Tile<T>& tile, const C* shift, const SoftmaxStats<C>& column) const {
    int64_t r = 0;
    for (; r + kGroup <= tile.rows; r += kGroup) add_rows<kGroup, kDiagonal>(tile, r, shift + r, column);
    for (; r < tile.rows; ++r) add_rows<1, kDiagonal>(tile, r, shift + r, column);
  }

  // Adds kRows rows, from r on, to the statistics of rows and columns, whose maxima are raised already. The pairs are
  // left out: see finish_direction.
  template <int kRows, bool kDiagonal>
  void add_rows(const Tile<T>& tile, int64_t r, const C* shift, const SoftmaxStats<C>& column) const {
    const SoftmaxStats<double> row = rows_.stats().at(tile.i0 + r);
    const C *of_row_pair = pairs_.data() + tile.i0 + r, *of_column_pair = pairs_.data() + tile.j0;
    const int64_t pair = tile.i0 + r - tile.j0;
    const auto lane = lane_numbers<C>();
    Vec<C> sum[kRows] = {}, dot[kRows] = {};
    for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
      const Vec<C> column_max = load(column.max + v), column_pair = load(of_column_pair + v);
      Vec<C> column_sum{}, column_dot{};
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec<C> d = load(tile.row(r + i) + v), logit = logits(d, scale_);
        Vec<C> of_row = in ? exp(logit - shift[i]) : Vec<C>{};
        Vec<C> of_column = exp(logit - column_max);
        if constexpr (kDiagonal) {
          const auto other = lane != static_cast<typename IntOf<C>::type>(pair + i - v);
          of_row = other ? of_row : Vec<C>{};
          of_column = other ? of_column : Vec<C>{};
        }
        sum[i] += of_row;
        dot[i] += of_row * (in ? d - of_row_pair[i] : Vec<C>{});
        column_sum += of_column;
        column_dot += of_column * (d - column_pair);
      }
      store(column.sum + v, load(column.sum + v) + column_sum);
      store(column.dot + v, load(column.dot + v) + column_dot);
    });
    for (int i = 0; i < kRows; ++i) {
      const double before = natural_exp(row.max[i] - shift[i]);
      row.max[i] = shift[i];
      row.sum[i] = row.sum[i] * before + reduce_add(sum[i]);
      row.dot[i] = row.dot[i] * before + reduce_add(dot[i]);
    }
  }

  // The columns' largest logits in this tile, and the rows' new running maxima.
  void raise_maxima(const Tile<T>& tile, C* column_max, C* shift) const {
    const Vec<C> lowest = splat(-FloatTraits<C>::infinity);
    for (int64_t v = 0; v < tile.cols; v += L) store(column_max + v, lowest);
    const double* running = rows_.stats().max + tile.i0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* s = tile.row(r);
      Vec<C> highest = lowest;
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        const Vec<C> logit = logits(load(s + v), scale_);
        highest = max(highest, in ? logit : lowest);
        store(column_max + v, max(load(column_max + v), logit));
      });
      const C of_tile = reduce_max(highest);
      shift[r] = of_tile > running[r] ? of_tile : static_cast<C>(running[r]);
    }
  }

  // A pair enters in double: when it has nearly all of the mass, the loss is what little the others have.
  void finish_direction(const SoftmaxStats<double>& stats, double* lse, double* loss, double* grad_scale) const {
    for (int64_t i = 0; i < n_; ++i) {
      const double pair = logits(splat(pairs_.data()[i]), scale_)[0], max = stats.max[i];
      const double sum = stats.sum[i] + natural_exp(pair - max), log_sum = natural_log(sum);
      lse[i] = max + log_sum;
      *loss += (max - pair) + log_sum;
      *grad_scale += stats.dot[i] / sum;
    }
  }

  const int64_t n_, tiles_;
  const C scale_;
  const int threads_;
  AlignedBuffer<C> pairs_;  // [N], readable for one vector past the end
  SoftmaxStatsBuffer<double> rows_, columns_;
  SoftmaxStatsBuffer<C> partial_;
};

template <class T>
void infonce_fwd(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& loss,
                 const Tensor& lse_q, const Tensor& lse_k, const Tensor& grad_scale, int threads) {
  using C = ComputeOf<T>;
  const auto x = rows_of<T>(queries), y = rows_of<T>(keys);
  double total = 0, slope = 0;
  if (x.count > 0) {
    InfoNCEForward<T> epilogue(x, y, *logit_scale.ptr<C>(), threads);
    for_each_tile(x, y, threads, epilogue);
    epilogue.finish(lse_q.ptr<double>(), lse_k.ptr<double>(), &total, &slope);
    total /= 2.0 * x.count;
    slope /= 2.0 * x.count;
  }
  *loss.ptr<C>() = static_cast<C>(total);
  *grad_scale.ptr<C>() = static_cast<C>(slope);
}

// An lse as the unevaluated sum of two numbers of the compute type.
template <class C>
class SplitLse {
 public:
  SplitLse(const double* lse, int64_t count) : high_(count + kLanes<C>), low_(count + kLanes<C>) {
    for (int64_t i = 0; i < count; ++i) {
      high_.data()[i] = static_cast<C>(lse[i]);
      low_.data()[i] = static_cast<C>(lse[i] - high_.data()[i]);
    }
  }
  const C* high() const { return high_.data(); }  // readable for one vector past the end
  const C* low() const { return low_.data(); }

 private:
  AlignedBuffer<C> high_, low_;
};

template <class T>
void infonce_bwd(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                 const Tensor& lse_q, const Tensor& lse_k, const Tensor& dqueries, const Tensor& dkeys, int threads) {
  using C = ComputeOf<T>;
  const auto x = rows_of<T>(queries), y = rows_of<T>(keys);
  if (x.count == 0) return;
  const C scale = *logit_scale.ptr<C>();
  const SplitLse<C> of_row(lse_q.ptr<double>(), x.count), of_column(lse_k.ptr<double>(), y.count);
  // G = p_q + p_k with p = exp(s - lse).
  const auto gradient = [&](const Tile<T>& tile) {
    const C *column_high = of_column.high() + tile.j0, *column_low = of_column.low() + tile.j0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      C* s = tile.row(r);
      const int64_t i = tile.i0 + r, pair = i - tile.j0;
      const bool here = pair >= 0 && pair < tile.cols;
      const double logit = here ? logits(splat(s[pair]), scale)[0] : 0;
      const C high = of_row.high()[i], low = of_row.low()[i];
      for_each_vector<C>(tile.cols, [&](int64_t v, auto) {
        const Vec<C> logit = logits(load(s + v), scale);
        const Vec<C> p_row = exp((logit - high) - low);
        store(s + v, p_row + exp((logit - load(column_high + v)) - load(column_low + v)));
      });
      // The pair: (p_q - 1) + (p_k - 1), in double, for what a p close to 1 lacks is the gradient.
      if (here) {
        const double p_q = natural_exp(logit - lse_q.ptr<double>()[i]),
                     p_k = natural_exp(logit - lse_k.ptr<double>()[i]);
        s[pair] = static_cast<C>((p_q - 1) + (p_k - 1));
      }
    }
  };
  const C factor = *grad_loss.ptr<C>() * scale / static_cast<C>(2 * x.count);
  feature_gradients(x, y, dqueries.ptr<T>(), dkeys.ptr<T>(), factor, threads, gradient);
}

// ---- SigLIP ---------------------------------------------------------------------------------------------------------

// sign is -1 on the lane of the positive pair, +1 elsewhere: a pair's loss is softplus(sign * logit).
template <class C>
MMK_INLINE Vec<C> signs(Vec<typename IntOf<C>::type> lane, int64_t positive) {
  using Int = typename IntOf<C>::type;
  const bool here = positive >= 0 && positive < kLanes<C>;
  return lane == (here ? static_cast<Int>(positive) : Int{-1}) ? splat(C{-1}) : splat(C{1});
}

// sigmoid(z) from e = exp(-|z|), without cancellation on either side.
template <class C>
MMK_INLINE Vec<C> sigmoid(Vec<C> z, Vec<C> e) {
  return (z < C{0} ? e : splat(C{1})) / (e + C{1});
}

// Forward epilogue: sums over each row of the loss and of its derivatives.
template <class T>
class SigLIPForward {
  using C = ComputeOf<T>;

 public:
  SigLIPForward(int64_t n, C scale, C bias) : n_(n), scale_(scale), bias_(bias), sums_(3 * n) {
    for (int64_t i = 0; i < 3 * n; ++i) sums_.data()[i] = 0;
  }

  void tile(int64_t, const Tile<T>& tile) const {
    const auto lane = lane_numbers<C>();
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* s = tile.row(r);
      const int64_t positive = tile.i0 + r - tile.j0;
      Vec<C> loss{}, by_scale{}, by_bias{};
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        const Vec<C> d = in ? load(s + v) : Vec<C>{}, sign = signs<C>(lane, positive - v);
        const Vec<C> z = sign * (d * scale_ + bias_), e = exp(min(z, -z));
        const Vec<C> softplus = max(Vec<C>{}, z) + log2_1p(e) * FloatTraits<C>::ln2;
        const Vec<C> slope = in ? sign * sigmoid<C>(z, e) : Vec<C>{};
        loss += in ? softplus : Vec<C>{};
        by_scale += slope * d;
        by_bias += slope;
      });
      double* sum = sums_.data() + 3 * (tile.i0 + r);
      sum[0] += reduce_add(loss);
      sum[1] += reduce_add(by_scale);
      sum[2] += reduce_add(by_bias);
    }
  }

  void finish_columns(int64_t, int64_t) const {}

  // The totals of loss, d loss / d scale, d loss / d bias over all rows.
  void finish(double (&total)[3]) const {
    for (int64_t i = 0; i < n_; ++i)
      for (int what = 0; what < 3; ++what) total[what] += sums_.data()[3 * i + what];
  }

 private:
  const int64_t n_;
  const C scale_, bias_;
  AlignedBuffer<double> sums_;  // [N, 3]
};

template <class T>
void siglip_fwd(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& logit_bias,
                const Tensor& loss, const Tensor& grad_scale, const Tensor& grad_bias, int threads) {
  using C = ComputeOf<T>;
  const auto x = rows_of<T>(queries), y = rows_of<T>(keys);
  double total[3] = {};
  if (x.count > 0) {
    SigLIPForward<T> epilogue(x.count, *logit_scale.ptr<C>(), *logit_bias.ptr<C>());
    for_each_tile(x, y, threads, epilogue);
    epilogue.finish(total);
    for (double& t : total) t /= static_cast<double>(x.count);
  }
  *loss.ptr<C>() = static_cast<C>(total[0]);
  *grad_scale.ptr<C>() = static_cast<C>(total[1]);
  *grad_bias.ptr<C>() = static_cast<C>(total[2]);
}

template <class T>
void siglip_bwd(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                const Tensor& logit_bias, const Tensor& dqueries, const Tensor& dkeys, int threads) {
  using C = ComputeOf<T>;
  const auto x = rows_of<T>(queries), y = rows_of<T>(keys);
  if (x.count == 0) return;
  const C scale = *logit_scale.ptr<C>(), bias = *logit_bias.ptr<C>();
  const auto gradient = [&](const Tile<T>& tile) {
    const auto lane = lane_numbers<C>();
    for (int64_t r = 0; r < tile.rows; ++r) {
      C* s = tile.row(r);
      const int64_t positive = tile.i0 + r - tile.j0;
      for_each_vector<C>(tile.cols, [&](int64_t v, auto) {
        const Vec<C> sign = signs<C>(lane, positive - v), z = sign * (load(s + v) * scale + bias);
        store(s + v, sign * sigmoid<C>(z, exp(min(z, -z))));
      });
    }
  };
  const C factor = *grad_loss.ptr<C>() * scale / static_cast<C>(x.count);
  feature_gradients(x, y, dqueries.ptr<T>(), dkeys.ptr<T>(), factor, threads, gradient);
}

// ---- one entry for every dtype --------------------------------------------------------------------------------------

template <class Body>
void with_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    case DType::f64:
      return body(double{});
    default:
      return;
  }
}

void infonce_fwd_any(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& loss,
                     const Tensor& lse_q, const Tensor& lse_k, const Tensor& grad_scale, int num_threads) {
  with_dtype(queries.dtype, [&](auto t) {
    infonce_fwd<decltype(t)>(queries, keys, logit_scale, loss, lse_q, lse_k, grad_scale, num_threads);
  });
}

void infonce_bwd_any(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                     const Tensor& lse_q, const Tensor& lse_k, const Tensor& dqueries, const Tensor& dkeys,
                     int num_threads) {
  with_dtype(queries.dtype, [&](auto t) {
    infonce_bwd<decltype(t)>(grad_loss, queries, keys, logit_scale, lse_q, lse_k, dqueries, dkeys, num_threads);
  });
}

void siglip_fwd_any(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& logit_bias,
                    const Tensor& loss, const Tensor& grad_scale, const Tensor& grad_bias, int num_threads) {
  with_dtype(queries.dtype, [&](auto t) {
    siglip_fwd<decltype(t)>(queries, keys, logit_scale, logit_bias, loss, grad_scale, grad_bias, num_threads);
  });
}

void siglip_bwd_any(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                    const Tensor& logit_bias, const Tensor& dqueries, const Tensor& dkeys, int num_threads) {
  with_dtype(queries.dtype, [&](auto t) {
    siglip_bwd<decltype(t)>(grad_loss, queries, keys, logit_scale, logit_bias, dqueries, dkeys, num_threads);
  });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(ContrastiveKernels, contrastive) = {&MMK_ISA::infonce_fwd_any, &MMK_ISA::infonce_bwd_any,
                                                       &MMK_ISA::siglip_fwd_any, &MMK_ISA::siglip_bwd_any};

}  // namespace mmk
