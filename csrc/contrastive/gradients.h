// The second half of the tile engine: feature gradients G Y and Gᵀ X, computing G from S tile by tile.
#pragma once

#include "contrastive/tiles.h"

namespace mmk {
namespace MMK_ISA {

// Rows and columns of the superblock of G that is kept for both gradients (13 MB of floats). Multiples of kTileCols, so
// that widening it for many threads does not change the order of additions.
constexpr int64_t kBlockRows = 2048, kBlockCols = 1536, kThreadsPerBlock = 16;

template <class T>
void store_scaled(const ComputeOf<T>* from, ComputeOf<T> factor, int64_t count, T* to) {
  constexpr int L = kLanes<ComputeOf<T>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i) * factor);
  store_n(to + i, load_n(from + i, count - i) * factor, count - i);
}

// dX = factor * G Y and dY = factor * Gᵀ X, where epilogue(tile, of_teacher) turns a tile of S = X Yᵀ into one of G, in
// place; `of_teacher` is the teacher's tile or null. dx and dy are contiguous [count, E]; null means not needed.
//
// Each superblock has two phases. First a thread takes a row tile, computes its tiles of G, stores them, and adds G Y
// to its rows of dX while they are in L2. Then a thread takes 96 columns of G and adds Gᵀ X to its rows of dY.
template <class T, class Epilogue>
class FeatureGradients {
  using C = ComputeOf<T>;

 public:
  FeatureGradients(const Operands<T>& student, const Operands<T>* teacher, T* dx, T* dy, C factor, int threads,
                   const Epilogue& epilogue)
      : x_(student.x),
        y_(student.y),
        teacher_(teacher),
        dx_(dx),
        dy_(dy),
        factor_(factor),
        threads_(threads),
        epilogue_(epilogue),
        width_(x_.width),
        block_rows_(min64(x_.count, kBlockRows * widened(threads))),
        block_cols_(min64(y_.count, kBlockCols * widened(threads))),
        workers_(usable_threads(ceil_div(max64(block_rows_, block_cols_), kTileRows), threads)),
        product_(student, block_cols_, workers_),
        of_teacher_(teacher ? *teacher : Operands<T>{}, teacher ? block_cols_ : 0, teacher ? workers_ : 0),
        y_depth_(dx ? depth_size(block_cols_) : 0),
        x_depth_(dy ? depth_size(block_rows_) : 0),
        g_tile_(workers_ * packed_size_a<T>(kTileRows, kTileCols<T>)),
        g_(dy ? block_rows_ * block_cols_ : 0),
        dx_sum_(dx ? block_rows_ * width_ : 0),
        dy_sum_(dy && !kSumsInPlace ? y_.count * width_ : 0) {}

  void run() {
    for (int64_t i0 = 0; i0 < x_.count; i0 += block_rows_) {
      const int64_t rows = min64(x_.count - i0, block_rows_);
      if (dy_) pack_depth(x_, i0, rows, threads_, x_depth_.data());
      for (int64_t j0 = 0; j0 < y_.count; j0 += block_cols_) {
        const int64_t cols = min64(y_.count - j0, block_cols_);
        product_.columns(j0, cols, threads_);
        if (teacher_) of_teacher_.columns(j0, cols, threads_);
        if (dx_) pack_depth(y_, j0, cols, threads_, y_depth_.data());
        parallel_for(ceil_div(rows, kTileRows), threads_, [&](int64_t t, int thread) {
          const int64_t r = t * kTileRows;
          row_tile(i0, j0, r, min64(rows - r, kTileRows), cols, thread);
        });
        if (!dy_) continue;
        parallel_for(ceil_div(cols, kTileRows), threads_, [&](int64_t t, int thread) {
          const int64_t c = t * kTileRows;
          column_tile(i0, j0, c, min64(cols - c, kTileRows), rows, thread);
        });
      }
    }
  }

 private:
  // dY itself holds its running sums if it has their type.
  static constexpr bool kSumsInPlace = sizeof(T) == sizeof(C);

  static int64_t widened(int threads) { return ceil_div(max64(threads, 1), kThreadsPerBlock); }
  int64_t depth_size(int64_t count) const {
    return ceil_div(count, kTileCols<T>) * packed_size_b<T>(width_, kTileCols<T>);
  }
  C* dy_sum() const {
    if constexpr (kSumsInPlace)
      return dy_;
    else
      return dy_sum_.data();
  }

  // Rows [r, r + count) of the superblock at (i0, j0): G, and its contribution to dX.
  void row_tile(int64_t i0, int64_t j0, int64_t r, int64_t count, int64_t cols, int thread) {
    Packed<T>* ga = g_tile_.data() + thread * packed_size_a<T>(kTileRows, kTileCols<T>);
    C* sum = dx_sum_.data() + r * width_;
    product_.rows(i0 + r, count, thread);
    if (teacher_) of_teacher_.rows(i0 + r, count, thread);
    for (int64_t c = 0; c < cols; c += kTileCols<T>) {
      const int64_t n = min64(cols - c, kTileCols<T>);
      const C* of_teacher = teacher_ ? of_teacher_.tile(count, c, n, thread) : nullptr;
      C* s = product_.tile(count, c, n, thread);
      const TileOf<T> tile{i0 + r, count, j0 + c, n, s};
      epilogue_(tile, of_teacher);
      if (dy_)
        for (int64_t i = 0; i < count; ++i) store_g(tile.row(i), n, g_.data() + (r + i) * block_cols_ + c);
      if (!dx_) continue;
      pack_a<T>(s, kTileCols<T>, 1, count, n, ga);
      gemm_packed<T>(count, width_, n, ga, y_depth_.data() + c / kTileCols<T> * packed_size_b<T>(width_, kTileCols<T>),
                     sum, width_, j0 + c > 0);
    }
    if (dx_ && j0 + cols == y_.count) store_scaled(sum, factor_, count * width_, dx_ + (i0 + r) * width_);
  }

  // Columns [c, c + count) of the superblock at (i0, j0): their contribution to dY.
  void column_tile(int64_t i0, int64_t j0, int64_t c, int64_t count, int64_t rows, int thread) {
    Packed<T>* ga = g_tile_.data() + thread * packed_size_a<T>(kTileRows, kTileCols<T>);
    C* sum = dy_sum() + (j0 + c) * width_;
    for (int64_t k = 0; k < rows; k += kTileCols<T>) {
      const int64_t depth = min64(rows - k, kTileCols<T>);
      pack_a<T>(g_.data() + k * block_cols_ + c, 1, block_cols_, count, depth, ga);
      gemm_packed<T>(count, width_, depth, ga,
                     x_depth_.data() + k / kTileCols<T> * packed_size_b<T>(width_, kTileCols<T>), sum, width_,
                     i0 + k > 0);
    }
    if (i0 + rows == x_.count) store_scaled(sum, factor_, count * width_, dy_ + (j0 + c) * width_);
  }

  static void store_g(const C* from, int64_t count, Packed<T>* to) { store_scaled<Packed<T>>(from, C{1}, count, to); }

  const Rows<T> x_, y_;
  const Operands<T>* const teacher_;
  T *const dx_, *const dy_;
  const C factor_;
  const int threads_;
  const Epilogue& epilogue_;
  const int64_t width_, block_rows_, block_cols_;
  const int workers_;
  Product<T> product_, of_teacher_;
  AlignedBuffer<Packed<T>> y_depth_, x_depth_;
  AlignedBuffer<Packed<T>> g_tile_, g_;
  AlignedBuffer<C> dx_sum_, dy_sum_;
};

template <class T, class Epilogue>
void feature_gradients(const Operands<T>& student, const Operands<T>* teacher, T* dx, T* dy, ComputeOf<T> factor,
                       int threads, const Epilogue& epilogue) {
  FeatureGradients<T, Epilogue>(student, teacher, dx, dy, factor, threads, epilogue).run();
}

}  // namespace MMK_ISA
}  // namespace mmk
