// The tile engine of the contrastive CPU kernels: S = X Yᵀ one tile at a time.
//
// Epilogues process the tiles. The order of every sum depends only on the sizes, so results do not depend on the number
// of threads.
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
// in which they are the inner dimension. The tile, its rows of X and its rows of Y stay in L2 (about 0.8 MB at E =
// 512).
constexpr int64_t kTileRows = 96;
template <class T>
constexpr int64_t kTileCols = 256 * kWordElements<T>;

template <class C, int64_t kStride>
struct SimilarityTile {
  using Number = C;
  static constexpr int64_t kCols = kStride;

  int64_t i0, rows, j0, cols;  // rows i0.. of X against rows j0.. of Y
  C* s;                        // [rows, kCols], cols of them filled
  const C* guide = nullptr;    // the guide's similarities of the same pairs, if a filter looks at them

  C* row(int64_t r) const { return s + r * kCols; }
};

// Several feature types share a tile type, so that epilogues are compiled once per tile type.
template <class T>
using TileOf = SimilarityTile<ComputeOf<T>, kTileCols<T>>;

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

// Packs rows [i0, i0 + count) of X as the inner dimension of B (columns = E): one operand per kTileCols rows.
template <class T>
void pack_depth(const Rows<T>& x, int64_t i0, int64_t count, int threads, Packed<T>* packed) {
  parallel_for(ceil_div(count, kTileCols<T>), threads, [&](int64_t task, int) {
    const int64_t k = task * kTileCols<T>;
    pack_b<T>(x.row(i0 + k), 1, x.stride, x.width, min64(count - k, kTileCols<T>),
              packed + task * packed_size_b<T>(x.width, kTileCols<T>));
  });
}

// ---- one pass over all tiles ----------------------------------------------------------------------------------------

// Both sides of a product, or of a teacher's or a guide's, which may have another width.
template <class T>
struct Operands {
  Rows<T> x, y;
};

constexpr int64_t kPassCols = 2048;  // columns per packed operand shared by the threads, a multiple of kTileCols

// Buffers of one product for kPassCols columns: the packed operand, and each thread's rows and tile.
template <class T>
class Product {
  using C = ComputeOf<T>;

 public:
  Product(const Operands<T>& of, int64_t max_cols, int workers)
      : x_(of.x),
        y_(of.y),
        a_size_(packed_size_a<T>(kTileRows, of.x.width)),
        b_(packed_size_b<T>(max_cols, of.x.width)),
        a_(workers * a_size_),
        s_(workers * kTileRows * kTileCols<T>) {}

  void columns(int64_t j0, int64_t cols, int threads) { pack_columns(y_, j0, cols, threads, b_.data()); }
  void rows(int64_t i0, int64_t rows, int thread) {
    pack_a<T>(x_.row(i0), x_.stride, 1, rows, x_.width, a_.data() + thread * a_size_);
  }
  // A tile of packed columns [c, c + n); c is a multiple of kTileCols.
  C* tile(int64_t rows, int64_t c, int64_t n, int thread) {
    C* s = s_.data() + thread * kTileRows * kTileCols<T>;
    gemm_packed<T>(rows, n, x_.width, a_.data() + thread * a_size_,
                   b_.data() + c / kColTile<T> * panel_size_b<T>(x_.width), s, kTileCols<T>, false);
    return s;
  }

 private:
  const Rows<T> x_, y_;
  const int64_t a_size_;
  AlignedBuffer<Packed<T>> b_, a_;
  AlignedBuffer<C> s_;
};

// Calls epilogue.tile(t, tile, of_teacher) for each tile of S, where t numbers the row tiles and `of_teacher` is the
// teacher's tile or null, and epilogue.finish_columns(j0, cols) when all rows of the columns [j0, j0 + cols), cols <=
// kPassCols, are done. The tiles of one row tile are processed in column order, one at a time.
template <class T, class Epilogue>
void for_each_tile(const Operands<T>& student, const Operands<T>* teacher, int threads, Epilogue& epilogue) {
  const int64_t n = student.x.count, m = student.y.count, tiles = ceil_div(n, kTileRows);
  const int workers = usable_threads(tiles, threads);
  Product<T> product(student, min64(m, kPassCols), workers);
  Product<T> of_teacher(teacher ? *teacher : Operands<T>{}, teacher ? min64(m, kPassCols) : 0, teacher ? workers : 0);
  for (int64_t j0 = 0; j0 < m; j0 += kPassCols) {
    const int64_t cols = min64(m - j0, kPassCols);
    product.columns(j0, cols, threads);
    if (teacher) of_teacher.columns(j0, cols, threads);
    parallel_for(tiles, threads, [&](int64_t t, int thread) {
      const int64_t i0 = t * kTileRows, rows = min64(n - i0, kTileRows);
      product.rows(i0, rows, thread);
      if (teacher) of_teacher.rows(i0, rows, thread);
      for (int64_t c = 0; c < cols; c += kTileCols<T>) {
        const int64_t count = min64(cols - c, kTileCols<T>);
        const auto* s = teacher ? of_teacher.tile(rows, c, count, thread) : nullptr;
        epilogue.tile(t, TileOf<T>{i0, rows, j0 + c, count, product.tile(rows, c, count, thread)}, s);
      }
    });
    epilogue.finish_columns(j0, cols);
  }
}

}  // namespace MMK_ISA
}  // namespace mmk
