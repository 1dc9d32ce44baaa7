// The epilogue that turns tiles of similarities into the gradient of a function of the statistics.
#pragma once

#include <utility>

#include "contrastive/contrastive.h"
#include "contrastive/softmax.h"

namespace mmk {
namespace MMK_ISA {

// A backward's inputs per row, or per column: coefficients [kCoefficients, count], and lse.
struct Line {
  const double *coefficients, *lse, *teacher_lse;
  int64_t count;

  double coefficient(Statistic line, int64_t i) const { return coefficients[line * count + i]; }
};

// The same in the compute type, with the coefficient of lse multiplied by scale. Readable for one vector past the end.
template <class C>
class SplitLine {
 public:
  SplitLine(const Line& line, C scale)
      : count_(line.count + kLanes<C>),
        data_(kCoefficients * count_),
        lse_(line.lse, line.count, scale),
        teacher_lse_(line.teacher_lse, line.teacher_lse ? line.count : 0, scale) {
    for (Statistic which : {kLse, kPositive, kTotal, kTeacher})
      for (int64_t i = 0; i < count_; ++i) {
        const double value = i < line.count ? line.coefficient(which, i) : 0;
        data_.data()[which * count_ + i] = static_cast<C>(which == kLse ? value * scale : value);
        any_[which] |= value != 0;
      }
  }
  const C* of(Statistic which) const { return data_.data() + which * count_; }
  bool any(Statistic which) const { return any_[which]; }
  const SplitLse<C>& lse() const { return lse_; }
  const SplitLse<C>& teacher_lse() const { return teacher_lse_; }

 private:
  int64_t count_;
  AlignedBuffer<C> data_;
  SplitLse<C> lse_, teacher_lse_;
  bool any_[kCoefficients] = {};
};

// One exponential for rows and columns, if kSpread allows it:
//   u_i p_ij + v_j q_ij = e^(scale a_ij - base) (u_i e^(base - lse_i) + v_j e^(base - lse_j)).
template <class C>
class SharedExponent {
 public:
  SharedExponent(const Line& rows, const Line& columns, C scale, bool wanted)
      : rows_(rows.count), factors_(wanted ? rows.count + columns.count + kLanes<C> : 0) {
    if (!wanted) return;
    double low = FloatTraits<double>::infinity, high = -low;
    bool finite = true;
    for (const Line* line : {&rows, &columns})
      for (int64_t i = 0; i < line->count; ++i) {
        const double lse = line->lse[i];
        finite &= lse - lse == 0;
        low = lse < low ? lse : low, high = lse > high ? lse : high;
      }
    serves_ = finite && high - low <= kSpread;
    base_ = static_cast<C>(high);
    if (!serves_) return;
    C* factor = factors_.data();
    for (const Line* line : {&rows, &columns})
      for (int64_t i = 0; i < line->count; ++i)
        *factor++ = static_cast<C>(scale * line->coefficient(kLse, i) * natural_exp(base_ - line->lse[i]));
    for (int i = 0; i < kLanes<C>; ++i) factor[i] = 0;
  }

  bool serves() const { return serves_; }
  C base() const { return base_; }
  const C* of_rows() const { return factors_.data(); }
  const C* of_columns() const { return factors_.data() + rows_; }  // readable for one vector past the end

 private:
  int64_t rows_;
  AlignedBuffer<C> factors_;
  bool serves_ = false;
  C base_ = 0;
};

// Backward epilogue: a tile of similarities becomes one of d / d similarity,
//   scale (u_i p_ij + v_j q_ij) + positive (..) + seen (..) + teacher (..)
// with p and q the softmax over rows and columns. A target's entry is computed in double, because there the gradient is
// 1 - p with p close to 1.
template <class Tile>
class SoftmaxGradient {
  using C = typename Tile::Number;

 public:
  SoftmaxGradient(const Line& rows, const Line& columns, C scale, const Pairs<C>& pairs, bool low_precision)
      : of_rows_(rows),
        of_columns_(columns),
        scale_(scale),
        pairs_(pairs),
        rows_(rows, scale),
        columns_(columns, scale),
        plain_(!pairs.rule().row_ids && !pairs.rule().thresholds && !rows_.any(kTotal) && !columns_.any(kTotal) &&
               !rows.teacher_lse),
        shared_(rows, columns, scale, low_precision && plain_ && columns.count > 0) {}

  // The second product is the teacher's or, with thresholds, the guide's.
  void operator()(Tile tile, const C* of_teacher) const {
    if (pairs_.rule().thresholds) std::swap(tile.guide, of_teacher);
    if (shared_.serves())
      shared_gradient(tile);
    else if (plain_)
      columns() ? gradient<false, true>(tile, of_teacher) : gradient<false, false>(tile, of_teacher);
    else
      columns() ? gradient<true, true>(tile, of_teacher) : gradient<true, false>(tile, of_teacher);
  }

 private:
  bool columns() const { return of_columns_.count > 0; }

  template <bool kGeneral, bool kColumns>
  void gradient(const Tile& tile, const C* of_teacher) const {
    const C *column_ref = columns_.lse().ref() + tile.j0, *column_rest = columns_.lse().rest() + tile.j0;
    const C* weight = columns_.of(kLse) + tile.j0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      C* s = tile.row(r);
      const int64_t i = tile.i0 + r, target = pairs_.rule().targets ? pairs_.in(tile, r) : -1;
      const double a = target >= 0 ? s[target] : 0;
      const Vec<C> ref = splat(rows_.lse().ref()[i]), rest = splat(rows_.lse().rest()[i]);
      const C row_weight = rows_.of(kLse)[i];
      [[maybe_unused]] const auto row = pairs_.row(tile, r);
      for_each_vector<C>(tile.cols, [&](int64_t v, auto) {
        const Vec<C> here = load(s + v);
        Vec<C> g = softmax(here, scale_, ref, rest) * row_weight;
        if constexpr (kColumns)
          g += softmax(here, scale_, load_at<kColumns>(column_ref, v), load_at<kColumns>(column_rest, v)) *
               load_at<kColumns>(weight, v);
        if constexpr (kGeneral) g = others<kColumns>(tile, row, r, v, g, of_teacher);
        store(s + v, g);
      });
      if (target >= 0)
        s[target] = at_target(i, tile.j0 + target, a, of_teacher ? of_teacher[r * Tile::kCols + target] : 0);
    }
  }

  void shared_gradient(const Tile& tile) const {
    const C* of_column = shared_.of_columns() + tile.j0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      C* s = tile.row(r);
      const int64_t i = tile.i0 + r, target = pairs_.rule().targets ? pairs_.in(tile, r) : -1;
      const double a = target >= 0 ? s[target] : 0;
      const C of_row = shared_.of_rows()[i];
      for_each_vector<C>(tile.cols, [&](int64_t v, auto) {
        store(s + v, exp(load(s + v) * scale_ - shared_.base()) * (load(of_column + v) + of_row));
      });
      if (target >= 0) s[target] = at_target(i, tile.j0 + target, a, 0);
    }
  }

  template <bool kColumns>
  static MMK_INLINE Vec<C> load_at(const C* p, int64_t v) {
    return kColumns ? load(p + v) : Vec<C>{};
  }

  template <bool kColumns, class Row>
  MMK_INLINE Vec<C> others(const Tile& tile, const Row& row, int64_t r, int64_t v, Vec<C> g,
                           const C* of_teacher) const {
    const int64_t i = tile.i0 + r, j = tile.j0 + v;
    g += load_at<kColumns>(columns_.of(kTotal), j) + rows_.of(kTotal)[i];
    if (of_teacher) {
      const Vec<C> b = load(of_teacher + r * Tile::kCols + v);
      const SplitLse<C>&of_row = rows_.teacher_lse(), &of_column = columns_.teacher_lse();
      g += softmax(b, scale_, splat(of_row.ref()[i]), splat(of_row.rest()[i])) * rows_.of(kTeacher)[i];
      if constexpr (kColumns)
        g +=
            softmax(b, scale_, load(of_column.ref() + j), load(of_column.rest() + j)) * load(columns_.of(kTeacher) + j);
    }
    if (pairs_.rule().by_id())
      g += row.same_id(v) ? load_at<kColumns>(columns_.of(kPositive), j) + rows_.of(kPositive)[i] : Vec<C>{};
    return pairs_.unseen(row, v) ? Vec<C>{} : g;
  }

  C at_target(int64_t i, int64_t j, double a, double of_teacher) const {
    double g = of_line(of_rows_, i, a, of_teacher);
    if (columns()) g += of_line(of_columns_, j, a, of_teacher);
    return static_cast<C>(g);
  }
  double of_line(const Line& line, int64_t i, double a, double of_teacher) const {
    double g = scale_ * line.coefficient(kLse, i) * natural_exp(scale_ * a - line.lse[i]);
    g += line.coefficient(kPositive, i);
    g += line.coefficient(kTotal, i);
    if (line.teacher_lse) g += line.coefficient(kTeacher, i) * natural_exp(scale_ * of_teacher - line.teacher_lse[i]);
    return g;
  }

  const Line of_rows_, of_columns_;
  const C scale_;
  const Pairs<C>& pairs_;
  const SplitLine<C> rows_, columns_;
  const bool plain_;
  const SharedExponent<C> shared_;
};

}  // namespace MMK_ISA
}  // namespace mmk
