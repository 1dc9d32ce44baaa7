// The epilogue that reduces tiles of similarities to row and column statistics.
#pragma once

#include <utility>

#include "contrastive/contrastive.h"
#include "contrastive/softmax.h"

namespace mmk {
namespace MMK_ISA {

// Forward epilogue. A row tile updates its rows' running statistics and stores the columns' statistics over its rows in
// `partial`; finish_columns merges these in tile order. During the pass `ref` and `best` are multiplied by the sign of
// the scale, so that they are maxima.
template <class Tile>
class SoftmaxForward {
  using C = typename Tile::Number;
  static constexpr int L = kLanes<C>;
  static constexpr int kGroup = 8;  // rows at a time: row sums stay in registers, and column sums are short
  static constexpr C kLowest = -FloatTraits<C>::infinity;

 public:
  SoftmaxForward(int64_t n, int64_t m, C scale, const Pairs<C>& pairs, const TeacherLse& teacher, bool totals,
                 bool columns, bool low_precision, int threads)
      : n_(n),
        m_(m),
        tiles_(ceil_div(n, kTileRows)),
        scale_(scale),
        sign_(scale < 0 ? C{-1} : C{1}),
        threads_(threads),
        totals_(totals),
        with_columns_(columns),
        low_precision_(low_precision),
        pairs_(pairs),
        teacher_rows_(teacher.rows, teacher.rows ? n : 0, scale),
        teacher_columns_(teacher.columns, teacher.columns ? m : 0, scale),
        target_(n),
        rows_(n),
        columns_(columns ? m : 0),
        partial_(columns ? tiles_ * kPassCols : 0) {
    rows_.clear();
    columns_.clear();
  }

  // The second product is the teacher's or, with thresholds, the guide's.
  void tile(int64_t t, Tile tile, const C* of_teacher) const {
    if (pairs_.rule().thresholds) std::swap(tile.guide, of_teacher);
    const Stats<C> column = partial_.stats().at(with_columns_ ? t * kPassCols + tile.j0 % kPassCols : 0);
    if (pairs_.rule().hides())
      with_columns_ ? statistics<true, true>(tile, column) : statistics<true, false>(tile, column);
    else if (pairs_.rule().targets && pairs_.meet(tile))
      with_columns_ ? statistics<true, true>(tile, column) : statistics<true, false>(tile, column);
    else
      with_columns_ ? statistics<false, true>(tile, column) : statistics<false, false>(tile, column);
    if (totals_) add_totals(tile, column);
    if (pairs_.rule().by_id()) add_positives(tile, column);
    if (of_teacher) add_teacher(tile, of_teacher, column);
  }

  void finish_columns(int64_t j0, int64_t cols) const {
    if (!with_columns_) return;
    parallel_chunks(cols, threads_, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = 0; t < tiles_; ++t) {
        const Stats<C> of_tile = partial_.stats().at(t * kPassCols);
        const Stats<double> column = columns_.stats().at(j0);
        for (int64_t c = begin; c < end; ++c) {
          column.ref[c] = of_tile.ref[c] > column.ref[c] ? of_tile.ref[c] : column.ref[c];
          if (totals_) column.total[c] += of_tile.total[c];
          if (teacher_rows_.given()) column.of_teacher[c] += of_tile.of_teacher[c];
          if (!pairs_.rule().by_id()) continue;
          column.positive[c] += of_tile.positive[c];
          column.best[c] = of_tile.best[c] > column.best[c] ? of_tile.best[c] : column.best[c];
        }
      }
      for (int64_t t = 0; t < tiles_; ++t)
        for (int64_t c = begin; c < end; c += L) merge(t, c, min64(end - c, L), columns_.stats().at(j0));
    });
  }

  // The statistics of rows [kStatistics, N] and columns [kStatistics, M].
  void finish(double* of_rows, double* of_columns) const {
    if (pairs_.rule().targets && !pairs_.rule().by_id()) add_targets();
    write(rows_.stats(), {of_rows, n_});
    if (with_columns_) write(columns_.stats(), {of_columns, m_});
  }

 private:
  class TeacherLse {
   public:
    TeacherLse(const double* lse, int64_t count, C scale) : given_(lse), split_(lse, count, scale) {}
    bool given() const { return given_; }
    const SplitLse<C>& split() const { return split_; }

   private:
    bool given_;
    SplitLse<C> split_;
  };

  // kMasked: some pairs (the target, pairs not seen) are excluded from the sums.
  template <bool kMasked, bool kColumns>
  void statistics(const Tile& tile, const Stats<C>& column) const {
    C ref[kTileRows];
    raise<kMasked, kColumns>(tile, column.ref, ref);
    if constexpr (kColumns)
      for (int64_t v = 0; v < tile.cols; v += L) {
        store(column.sum + v, Vec<C>{});
        store(column.dot + v, Vec<C>{});
      }
    if constexpr (kMasked)
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t target = pairs_.in(tile, r);
        if (target >= 0) target_.data()[tile.i0 + r] = tile.row(r)[target];
      }
    if constexpr (kColumns && !kMasked) {
      const Range range(ref, tile.rows, column.ref, tile.cols);
      if (low_precision_ && sign_ * scale_ * (range.high - range.low) <= kSpread) {
        add_all_rows<kMasked, kColumns, true>(tile, ref, range.high, column);
        for (int64_t v = 0; v < tile.cols; v += L) {
          const Vec<C> below = (range.high - load(column.ref + v)) * sign_, weight = exp(below * scale_);
          const Vec<C> sum = load(column.sum + v);
          store(column.dot + v, weight * (load(column.dot + v) + sum * below));
          store(column.sum + v, weight * sum);
        }
        return;
      }
    }
    add_all_rows<kMasked, kColumns, false>(tile, ref, 0, column);
  }

  // Range of a tile's references.
  struct Range {
    C low, high;

    Range(const C* rows, int64_t row_count, const C* columns, int64_t column_count) {
      Vec<C> least = splat(rows[0]), most = least;
      for_each_vector<C>(column_count, [&](int64_t v, auto in) {
        const Vec<C> ref = keep(in, load(columns + v), splat(rows[0]));
        least = min(ref, least), most = max(ref, most);
      });
      low = -reduce_max(-least), high = reduce_max(most);
      for (int64_t r = 0; r < row_count; ++r) {
        low = rows[r] < low ? rows[r] : low;
        high = rows[r] > high ? rows[r] : high;
      }
    }
  };

  template <bool kMasked, bool kColumns, bool kShared>
  void add_all_rows(const Tile& tile, const C* ref, C shared, const Stats<C>& column) const {
    int64_t r = 0;
    for (; r + kGroup <= tile.rows; r += kGroup)
      add_rows<kGroup, kMasked, kColumns, kShared>(tile, r, ref + r, shared, column);
    for (; r < tile.rows; ++r) add_rows<1, kMasked, kColumns, kShared>(tile, r, ref + r, shared, column);
  }

  // The columns' references in this tile, and the rows' updated running ones. Pairs not seen are ignored.
  template <bool kMasked, bool kColumns>
  void raise(const Tile& tile, C* column_ref, C* ref) const {
    const Vec<C> lowest = splat(kLowest);
    if constexpr (kColumns)
      for (int64_t v = 0; v < tile.cols; v += L) store(column_ref + v, lowest);
    const double* running = rows_.stats().ref + tile.i0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* s = tile.row(r);
      const auto row = pairs_.row(tile, r);
      Vec<C> highest = lowest;
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        Vec<C> b = load(s + v) * sign_;
        if constexpr (kMasked) b = pairs_.unseen(row, v) ? lowest : b;
        highest = max(highest, keep(in, b, lowest));
        if constexpr (kColumns) store(column_ref + v, max(load(column_ref + v), b));
      });
      const C of_tile = reduce_max(highest);
      ref[r] = of_tile > running[r] ? of_tile : static_cast<C>(running[r]);
    }
  }

  // Adds kRows rows starting at r to the sums of rows and columns, whose references are already updated. kShared: one
  // exponential, relative to `shared`, is used for both, and column sums stay relative to it.
  template <int kRows, bool kMasked, bool kColumns, bool kShared>
  void add_rows(const Tile& tile, int64_t r, const C* raised, C shared, const Stats<C>& column) const {
    const Stats<double> running = rows_.stats().at(tile.i0 + r);
    typename Pairs<C>::Row row[kRows];
    C ref[kRows];
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kMasked) row[i] = pairs_.row(tile, r + i);
      ref[i] = (kShared ? shared : raised[i]) * sign_;
    }
    Vec<C> sum[kRows] = {}, dot[kRows] = {};
    for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
      [[maybe_unused]] Vec<C> column_ref, column_sum{}, column_dot{};
      if constexpr (kColumns && !kShared) column_ref = load(column.ref + v) * sign_;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec<C> a = load(tile.row(r + i) + v);
        Vec<C> below = keep(in, a - ref[i]), e = keep(in, exp(below * scale_));
        [[maybe_unused]] Vec<C> column_below, column_e;
        if constexpr (kShared)
          column_below = below, column_e = e;
        else if constexpr (kColumns)
          column_below = a - column_ref, column_e = exp(column_below * scale_);
        if constexpr (kMasked) {
          const auto out = row[i].is_target(v) | pairs_.unseen(row[i], v);
          below = out ? Vec<C>{} : below, e = out ? Vec<C>{} : e;
          if constexpr (kColumns) column_below = out ? Vec<C>{} : column_below, column_e = out ? Vec<C>{} : column_e;
        }
        sum[i] += e;
        dot[i] += e * below;
        if constexpr (kColumns) column_sum += column_e, column_dot += column_e * column_below;
      }
      if constexpr (kColumns) {
        store(column.sum + v, load(column.sum + v) + column_sum);
        store(column.dot + v, load(column.dot + v) + column_dot);
      }
    });
    for (int i = 0; i < kRows; ++i) {
      const Shift shift(running.ref[i], raised[i], sign_, scale_);
      shift.move(&running.sum[i], &running.dot[i]);
      running.ref[i] = raised[i];
      double more = reduce_add(sum[i]), more_dot = reduce_add(dot[i]);
      if constexpr (kShared) Shift(shared, raised[i], sign_, scale_).move(&more, &more_dot);
      running.sum[i] += more;
      running.dot[i] += more_dot;
    }
  }

  // Rescales sums from one reference to another.
  struct Shift {
    double weight, below;

    Shift(double from, double to, C sign, C scale) {
      below = from > -FloatTraits<double>::infinity ? sign * (from - to) : 0;
      weight = from > -FloatTraits<double>::infinity ? natural_exp(scale * below) : 0;
    }
    void move(double* sum, double* dot) const {
      *dot = weight * (*dot + *sum * below);
      *sum *= weight;
    }
  };

  // Adds columns [c, c + count) of row tile t to the merged ones, whose references are final.
  void merge(int64_t t, int64_t c, int64_t count, const Stats<double>& merged) const {
    const Stats<C> of_tile = partial_.stats().at(t * kPassCols + c);
    C below[L], weight[L];
    for (int64_t i = 0; i < L; ++i) {
      const bool seen = i < count && of_tile.ref[i] != kLowest;
      below[i] = seen ? sign_ * static_cast<C>(of_tile.ref[i] - merged.ref[c + i]) : C{0};
    }
    store(weight, exp(load(below) * scale_));
    for (int64_t i = 0; i < count; ++i) {
      if (of_tile.ref[i] == kLowest) continue;
      const double w = weight[i], sum = of_tile.sum[i];
      merged.sum[c + i] += w * sum;
      merged.dot[c + i] += w * (of_tile.dot[i] + sum * below[i]);
    }
  }

  void add_totals(const Tile& tile, const Stats<C>& column) const {
    add_to_both(tile, column.total, rows_.stats().total, [&](const auto& row, int64_t r, int64_t v) {
      const Vec<C> a = load(tile.row(r) + v);
      return Both{pairs_.unseen(row, v) ? Vec<C>{} : a, pairs_.unseen(row, v) ? Vec<C>{} : a};
    });
  }

  void add_teacher(const Tile& tile, const C* of_teacher, const Stats<C>& column) const {
    const SplitLse<C>&of_row = teacher_rows_.split(), &of_column = teacher_columns_.split();
    add_to_both(tile, column.of_teacher, rows_.stats().of_teacher, [&](const auto& row, int64_t r, int64_t v) {
      const Vec<C> a = load(tile.row(r) + v), b = load(of_teacher + r * Tile::kCols + v);
      const int64_t i = tile.i0 + r, j = tile.j0 + v;
      const auto unseen = pairs_.unseen(row, v);
      const Vec<C> p = softmax(b, scale_, splat(of_row.ref()[i]), splat(of_row.rest()[i]));
      Vec<C> q{};
      if (with_columns_) q = softmax(b, scale_, load(of_column.ref() + j), load(of_column.rest() + j));
      return Both{unseen ? Vec<C>{} : p * a, unseen ? Vec<C>{} : q * a};
    });
  }

  void add_positives(const Tile& tile, const Stats<C>& column) const {
    add_to_both(tile, column.positive, rows_.stats().positive, [&](const auto& row, int64_t r, int64_t v) {
      const Vec<C> a = row.same_id(v) ? load(tile.row(r) + v) : Vec<C>{};
      return Both{a, a};
    });
    const Vec<C> lowest = splat(kLowest);
    if (with_columns_)
      for (int64_t v = 0; v < tile.cols; v += L) store(column.best + v, lowest);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto row = pairs_.row(tile, r);
      Vec<C> highest = lowest;
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        const Vec<C> b = row.same_id(v) ? load(tile.row(r) + v) * sign_ : lowest;
        highest = max(highest, keep(in, b, lowest));
        if (with_columns_) store(column.best + v, max(load(column.best + v), b));
      });
      double& best = rows_.stats().best[tile.i0 + r];
      best = reduce_max(highest) > best ? reduce_max(highest) : best;
    }
  }

  struct Both {
    Vec<C> row, column;
  };
  template <class Value>
  MMK_INLINE void add_to_both(const Tile& tile, C* column, double* rows, const Value& value) const {
    if (with_columns_)
      for (int64_t v = 0; v < tile.cols; v += L) store(column + v, Vec<C>{});
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto row = pairs_.row(tile, r);
      Vec<C> sum{};
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        const Both both = value(row, r, v);
        sum += keep(in, both.row);
        if (with_columns_) store(column + v, load(column + v) + both.column);
      });
      rows[tile.i0 + r] += reduce_add(sum);
    }
  }

  // Adds the targets, to their rows and columns.
  void add_targets() const {
    const Stats<double> row = rows_.stats(), column = columns_.stats();
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t j = pairs_.rule().target(i);
      if (j < 0 || j >= m_) continue;
      const double a = target_.data()[i];
      add_target(row.at(i), a);
      if (with_columns_) add_target(column.at(j), a);
    }
  }
  void add_target(const Stats<double>& line, double a) const {
    const double below = a - sign_ * *line.ref, e = natural_exp(scale_ * below), b = a * sign_;
    *line.sum += e;
    *line.dot += e * below;
    *line.positive += a;
    *line.best = b > *line.best ? b : *line.best;
  }

  void write(const Stats<double>& stats, const StatisticLines& out) const {
    constexpr double lowest = -FloatTraits<double>::infinity;
    for (int64_t i = 0; i < out.count; ++i) {
      const bool any = stats.ref[i] != lowest;
      const double ref = sign_ * stats.ref[i];
      out.at(kLse, i) = any ? scale_ * ref + natural_log(stats.sum[i]) : lowest;
      out.at(kPositive, i) = stats.positive[i];
      out.at(kTotal, i) = stats.total[i];
      out.at(kTeacher, i) = stats.of_teacher[i];
      out.at(kMean, i) = any ? ref + stats.dot[i] / stats.sum[i] : 0;
      out.at(kTop, i) = any ? scale_ * ref : lowest;
      out.at(kBest, i) = stats.best[i] != lowest ? scale_ * (sign_ * stats.best[i]) : lowest;
    }
  }

  const int64_t n_, m_, tiles_;
  const C scale_, sign_;
  const int threads_;
  const bool totals_, with_columns_, low_precision_;
  const Pairs<C>& pairs_;
  const TeacherLse teacher_rows_, teacher_columns_;
  AlignedBuffer<C> target_;  // [N] similarity of each row's target
  StatsBuffer<double> rows_, columns_;
  StatsBuffer<C> partial_;
};

}  // namespace MMK_ISA
}  // namespace mmk
