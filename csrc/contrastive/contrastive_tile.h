// Shared by the contrastive CUDA kernels: the block-level matrix product, the sweep over similarity tiles, the dtype
// switch.
#pragma once

#include <cfloat>
#include <climits>

#include "common/check.h"
#include "common/cuda/dtype.h"
#include "common/cuda/launch.h"
#include "common/cuda/tile.h"
#include "contrastive/contrastive.h"

namespace mmk::cuda {

constexpr int kTile = 128;     // rows and columns of a block's tile
constexpr int kThreads = 256;  // 2 x 4 warps of 64 x 32
constexpr int kWarpsM = 2, kWarpsN = 4;
constexpr int kMI = kTile / kWarpsM / 16, kNI = kTile / kWarpsN / 8;

// Two blocks, so that one's epilogue overlaps with the other's product; float needs the registers of both.
template <class T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 4 ? 1 : 2;

using Accumulator = float[kMI][kNI][4];

// Row and column in the block's tile of element e of this thread's accumulator tile (mi, ni).
__device__ __forceinline__ int warp_m() { return threadIdx.x / kWarp / kWarpsN; }
__device__ __forceinline__ int warp_n() { return threadIdx.x / kWarp % kWarpsN; }
__device__ __forceinline__ int tile_row(int mi, int e) { return warp_m() * 16 * kMI + mi * 16 + fragment_row(e); }
__device__ __forceinline__ int tile_column(int ni, int e) { return warp_n() * 8 * kNI + ni * 8 + fragment_column(e); }

// Elements of k per stage: 128 bytes of a row. Two stages of both operands.
template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kOperandBytes = tile_bytes<T>(kTile, kDepth<T>) > tile_bytes<T>(kDepth<T>, kTile)
                                  ? tile_bytes<T>(kTile, kDepth<T>)
                                  : tile_bytes<T>(kDepth<T>, kTile);
template <class T>
constexpr int kGemmBytes = 4 * kOperandBytes<T>;

template <Major kMajor, class T>
__device__ __forceinline__ void load_operand(T* tile, const Matrix<T>& x, int outer, int k) {
  if constexpr (kMajor == Major::k) {
    load_tile<kTile, kDepth<T>, kThreads>(tile, x, outer, k);
  } else {
    load_tile<kDepth<T>, kTile, kThreads>(tile, x, k, outer);
  }
}

// acc = A[m0 : m0 + 128, :] B[:, n0 : n0 + 128] summed over `depth`, by the whole block; zeros out of bounds. A is [m,
// k] (Major::k) or [k, m]; B is [n, k] (Major::k) or [k, n]. Shared memory: kGemmBytes<T>, reusable on return; before
// the call, a barrier must follow its last use.
template <Major kMajorA, Major kMajorB, class T>
__device__ __forceinline__ void block_gemm(Accumulator& acc, const Matrix<T>& a, int m0, const Matrix<T>& b, int n0,
                                           int depth) {
  constexpr int kLda = kMajorA == Major::k ? pitch<T>(kDepth<T>) : pitch<T>(kTile);
  constexpr int kLdb = kMajorB == Major::k ? pitch<T>(kDepth<T>) : pitch<T>(kTile);
  const auto stage_a = [](int stage) { return reinterpret_cast<T*>(dynamic_smem() + 2 * stage * kOperandBytes<T>); };
  const auto stage_b = [](int stage) {
    return reinterpret_cast<T*>(dynamic_smem() + (2 * stage + 1) * kOperandBytes<T>);
  };
  const int a_offset = warp_m() * 16 * kMI * (kMajorA == Major::k ? kLda : 1);
  const int b_offset = warp_n() * 8 * kNI * (kMajorB == Major::k ? kLdb : 1);

  clear(acc);
  load_operand<kMajorA>(stage_a(0), a, m0, 0);
  load_operand<kMajorB>(stage_b(0), b, n0, 0);
  cp_async_commit();
  int stage = 0;
  for (int k = 0; k < depth; k += kDepth<T>, stage ^= 1) {
    if (k + kDepth<T> < depth) {
      load_operand<kMajorA>(stage_a(stage ^ 1), a, m0, k + kDepth<T>);
      load_operand<kMajorB>(stage_b(stage ^ 1), b, n0, k + kDepth<T>);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    warp_gemm<kMajorA, kMajorB>(acc, stage_a(stage) + a_offset, kLda, stage_b(stage) + b_offset, kLdb, kDepth<T>);
    __syncthreads();
  }
}

// How a forward kernel covers the N x M similarities: block (x, y) takes every gridDim.x-th row tile, and of each the
// y-th share of the column tiles. So each block owns a line of the column partials and, for its share, a line of the
// row partials.
struct Sweep {
  int row_tiles, column_tiles;
  int blocks_m, blocks_n;

  __device__ __forceinline__ int first_column_tile() const { return share(blockIdx.y); }
  __device__ __forceinline__ int last_column_tile() const { return share(blockIdx.y + 1); }
  __device__ __forceinline__ int share(unsigned i) const {
    return static_cast<int>(static_cast<int64_t>(column_tiles) * i / blocks_n);
  }
};

// Upper bounds of a sweep's grid on any device, used to size the workspace.
constexpr int kMaxBlocksM = 80, kMaxBlocks = 320, kColumnShares = 4;

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t max_blocks_m(int64_t n) { return smaller(tiles_of(n), kMaxBlocksM); }
inline int64_t max_blocks_n(int64_t n, int64_t m) {
  return smaller(tiles_of(m), larger(kColumnShares, kMaxBlocks / larger(1, tiles_of(n))));
}

// Two blocks per multiprocessor. Few row tiles are split by columns; many are split by rows with four column shares,
// which limits the column partials to a quarter of the blocks.
inline Sweep sweep_of(int64_t n, int64_t m) {
  Sweep sweep{static_cast<int>(tiles_of(n)), static_cast<int>(tiles_of(m)), 1, 1};
  const int64_t blocks = smaller(2 * num_multiprocessors(), kMaxBlocks);
  sweep.blocks_m = static_cast<int>(larger(1, smaller(max_blocks_m(n), blocks / kColumnShares)));
  sweep.blocks_n = static_cast<int>(larger(1, smaller(max_blocks_n(n, m), blocks / sweep.blocks_m)));
  return sweep;
}

// Hands out 256-byte aligned pieces of a workspace. With a null base it only counts.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(const Tensor& bytes) : base_(bytes.ptr<unsigned char>()), size_(bytes.size[0]) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    MMK_CHECK(base_ == nullptr || used_ <= size_, "contrastive: workspace of ", size_, " bytes is too small");
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

template <class T>
Matrix<T> matrix_of(const Tensor& x) {
  MMK_CHECK(x.size[0] < INT_MAX - kTile && x.size[1] < INT_MAX - kTile, "contrastive: more than 2^31 rows or columns");
  return {x.ptr<T>(), x.stride[0], static_cast<int>(x.size[0]), static_cast<int>(x.size[1]),
          rows_aligned(x, sizeof(T))};
}

}  // namespace mmk::cuda
