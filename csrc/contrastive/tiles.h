// The tile engine of the contrastive CPU kernels: S = X Yᵀ one tile at a time, and the feature gradients G Y and Gᵀ X.
//
// What is done with a tile is an epilogue's business. Every sum is made in an order that depends on the sizes alone,
// so results have the same bits for any number of threads.
#pragma once

#include "common/parallel.h"
#include "common/simd/gemm.h"

namespace mmk {
namespace MMK_ISA {

// Rows of features: X [count, width] or Y, last dimension contiguous.
template <class T>
struct Rows {
  const T* data;
  int64_t count, width, stride;

  const T* row(int64_t i) const { return data + i * stride; }
};

// A tile of S. 96 rows are whole register tiles on every instruction set; the columns are one depth block of the GEMM
// that has them as its inner dimension. Tile, its rows of X and its rows of Y stay in L2 (about .8 MB at E = 512).
constexpr int64_t kTileRows = 96;
template <class T>
constexpr int64_t kTileCols = 256 * kWordElements<T>;

template <class T>
struct Tile {
  int64_t i0, rows, j0, cols;  // rows i0.. of X against rows j0.. of Y
  ComputeOf<T>* s;             // [rows, kTileCols<T>], cols of them filled

  ComputeOf<T>* row(int64_t r) const { return s + r * kTileCols<T>; }
};

MMK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
MMK_INLINE int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

// Packs rows [j0, j0 + cols) of Y as the columns of B (k = E), for gemm_packed to use from any multiple of kTileCols.
template <class T>
void pack_columns(const Rows<T>& y, int64_t j0, int64_t cols, int threads, Packed<T>* packed) {
  parallel_for(ceil_div(cols, kTileCols<T>), threads, [&](int64_t task, int) {
    const int64_t c = task * kTileCols<T>;
    pack_b<T>(y.row(j0 + c), y.stride, 1, min64(cols - c, kTileCols<T>), y.width,
              packed + c / kColTile<T> * panel_size_b<T>(y.width));
  });
}

// Packs rows [i0, i0 + count) of X as the inner dimension of B (columns = E): one operand for each kTileCols of them.
template <class T>
void pack_depth(const Rows<T>& x, int64_t i0, int64_t count, int threads, Packed<T>* packed) {
  parallel_for(ceil_div(count, kTileCols<T>), threads, [&](int64_t task, int) {
    const int64_t k = task * kTileCols<T>;
    pack_b<T>(x.row(i0 + k), 1, x.stride, x.width, min64(count - k, kTileCols<T>),
              packed + task * packed_size_b<T>(x.width, kTileCols<T>));
  });
}

// ---- one pass over all tiles ----------------------------------------------------------------------------------------

constexpr int64_t kPassCols = 2048;  // columns whose packed operand the threads share, a multiple of kTileCols

// Calls epilogue.tile(t, tile) for each tile of S, where t numbers the row tiles, and epilogue.finish_columns(j0, cols)
// when all rows have met the columns [j0, j0 + cols), cols <= kPassCols. The tiles of one row tile come in the order of
// their columns, never two at a time.
template <class T, class Epilogue>
void for_each_tile(const Rows<T>& x, const Rows<T>& y, int threads, Epilogue& epilogue) {
  const int64_t width = x.width, tiles = ceil_div(x.count, kTileRows);
  const int64_t a_size = packed_size_a<T>(kTileRows, width), s_size = kTileRows * kTileCols<T>;
  const int workers = usable_threads(tiles, threads);
  AlignedBuffer<Packed<T>> b(packed_size_b<T>(min64(y.count, kPassCols), width)), a(workers * a_size);
  AlignedBuffer<ComputeOf<T>> s(workers * s_size);
  for (int64_t j0 = 0; j0 < y.count; j0 += kPassCols) {
    const int64_t cols = min64(y.count - j0, kPassCols);
    pack_columns(y, j0, cols, threads, b.data());
    parallel_for(tiles, threads, [&](int64_t t, int thread) {
      const int64_t i0 = t * kTileRows, rows = min64(x.count - i0, kTileRows);
      Packed<T>* own_a = a.data() + thread * a_size;
      ComputeOf<T>* own_s = s.data() + thread * s_size;
      pack_a<T>(x.row(i0), x.stride, 1, rows, width, own_a);
      for (int64_t c = 0; c < cols; c += kTileCols<T>) {
        const int64_t n = min64(cols - c, kTileCols<T>);
        gemm_packed<T>(rows, n, width, own_a, b.data() + c / kColTile<T> * panel_size_b<T>(width), own_s, kTileCols<T>,
                       false);
        epilogue.tile(t, Tile<T>{i0, rows, j0 + c, n, own_s});
      }
    });
    epilogue.finish_columns(j0, cols);
  }
}

// ---- feature gradients ----------------------------------------------------------------------------------------------

// Rows and columns of the superblock of G that is kept while both gradients take from it (19 MB of floats).
// Multiples of kTileRows and kTileCols, so that widening it for many threads changes no order of additions.
constexpr int64_t kBlockRows = 3072, kBlockCols = 1536, kThreadsPerBlock = 16;

template <class T>
void store_scaled(const ComputeOf<T>* from, ComputeOf<T> factor, int64_t count, T* to) {
  constexpr int L = kLanes<ComputeOf<T>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i) * factor);
  store_n(to + i, load_n(from + i, count - i) * factor, count - i);
}

// dX = factor * G Y and dY = factor * Gᵀ X, where epilogue(tile) turns a tile of S = X Yᵀ into one of G, in place.
// dx and dy are contiguous [count, E]; either may be null: not wanted.
//
// Superblock by superblock, in two phases: a thread takes a row tile, makes its tiles of G, adds G Y to its rows of dX
// while they are in L2, and leaves G behind; then a thread takes 96 columns of G and adds Gᵀ X to its rows of dY.
template <class T, class Epilogue>
class FeatureGradients {
  using C = ComputeOf<T>;

 public:
  FeatureGradients(const Rows<T>& x, const Rows<T>& y, T* dx, T* dy, C factor, int threads, const Epilogue& epilogue)
      : x_(x),
        y_(y),
        dx_(dx),
        dy_(dy),
        factor_(factor),
        threads_(threads),
        epilogue_(epilogue),
        width_(x.width),
        block_rows_(min64(x.count, kBlockRows * widened(threads))),
        block_cols_(min64(y.count, kBlockCols * widened(threads))),
        workers_(usable_threads(ceil_div(max64(block_rows_, block_cols_), kTileRows), threads)),
        y_cols_(packed_size_b<T>(block_cols_, width_)),
        y_depth_(dx ? depth_size(block_cols_) : 0),
        x_depth_(dy ? depth_size(block_rows_) : 0),
        x_tile_(workers_ * packed_size_a<T>(kTileRows, width_)),
        s_(workers_ * kTileRows * kTileCols<T>),
        g_tile_(workers_ * packed_size_a<T>(kTileRows, kTileCols<T>)),
        g_(dy ? block_rows_ * block_cols_ : 0),
        dx_sum_(dx ? block_rows_ * width_ : 0),
        dy_sum_(dy && !kSumsInPlace ? y.count * width_ : 0) {}

  void run() {
    for (int64_t i0 = 0; i0 < x_.count; i0 += block_rows_) {
      const int64_t rows = min64(x_.count - i0, block_rows_);
      if (dy_) pack_depth(x_, i0, rows, threads_, x_depth_.data());
      for (int64_t j0 = 0; j0 < y_.count; j0 += block_cols_) {
        const int64_t cols = min64(y_.count - j0, block_cols_);
        pack_columns(y_, j0, cols, threads_, y_cols_.data());
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
  // The output itself holds the running sums of dY when it has their type.
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

  // Rows [r, r + count) of the superblock at (i0, j0): G, and what they add to dX.
  void row_tile(int64_t i0, int64_t j0, int64_t r, int64_t count, int64_t cols, int thread) {
    Packed<T>* a = x_tile_.data() + thread * packed_size_a<T>(kTileRows, width_);
    Packed<T>* ga = g_tile_.data() + thread * packed_size_a<T>(kTileRows, kTileCols<T>);
    C* s = s_.data() + thread * kTileRows * kTileCols<T>;
    C* sum = dx_sum_.data() + r * width_;
    pack_a<T>(x_.row(i0 + r), x_.stride, 1, count, width_, a);
    for (int64_t c = 0; c < cols; c += kTileCols<T>) {
      const int64_t n = min64(cols - c, kTileCols<T>);
      gemm_packed<T>(count, n, width_, a, y_cols_.data() + c / kColTile<T> * panel_size_b<T>(width_), s, kTileCols<T>,
                     false);
      const Tile<T> tile{i0 + r, count, j0 + c, n, s};
      epilogue_(tile);
      if (dy_)
        for (int64_t i = 0; i < count; ++i) store_g(tile.row(i), n, g_.data() + (r + i) * block_cols_ + c);
      if (!dx_) continue;
      pack_a<T>(s, kTileCols<T>, 1, count, n, ga);
      gemm_packed<T>(count, width_, n, ga, y_depth_.data() + c / kTileCols<T> * packed_size_b<T>(width_, kTileCols<T>),
                     sum, width_, j0 + c > 0);
    }
    if (dx_ && j0 + cols == y_.count) store_scaled(sum, factor_, count * width_, dx_ + (i0 + r) * width_);
  }

  // Columns [c, c + count) of the superblock at (i0, j0): what they add to dY.
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
  T *const dx_, *const dy_;
  const C factor_;
  const int threads_;
  const Epilogue& epilogue_;
  const int64_t width_, block_rows_, block_cols_;
  const int workers_;
  AlignedBuffer<Packed<T>> y_cols_, y_depth_, x_depth_, x_tile_;
  AlignedBuffer<C> s_;
  AlignedBuffer<Packed<T>> g_tile_, g_;
  AlignedBuffer<C> dx_sum_, dy_sum_;
};

template <class T, class Epilogue>
void feature_gradients(const Rows<T>& x, const Rows<T>& y, T* dx, T* dy, ComputeOf<T> factor, int threads,
                       const Epilogue& epilogue) {
  FeatureGradients<T, Epilogue>(x, y, dx, dy, factor, threads, epilogue).run();
}

}  // namespace MMK_ISA
}  // namespace mmk
