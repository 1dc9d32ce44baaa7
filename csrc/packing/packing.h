// Packing: launchers that move and pool token rows. They check nothing; Python checks bounds and names arguments.
//
// Dimension letters: R rows of a source, T packed tokens, E features per row, S segments.
// Row tensors are 2-D with a contiguous last dimension and any row stride; outputs and index tensors are contiguous.
// Offsets are 64-bit. Sums accumulate in float32, or float64 for float64.
#pragma once

#include "common/dispatch.h"
#include "common/tensor.h"

namespace mmk {

enum class PoolMode : int { sum = 0, mean = 1, max = 2, first = 3 };

struct PackingKernels {
  // out[t] = row index[t] of the concatenated sources, or zeros where index[t] == -1
  void (*gather_fwd)(const Tensor& first,   // [R1, E]
                     const Tensor& second,  // [R2, E], or not given, etc.
                     const Tensor& third, const Tensor& fourth,
                     const Tensor& index,  // [T] int64 in [-1, R1 + R2 + ...)
                     // outputs
                     const Tensor& out,  // [T, E]
                     int num_threads);

  // out[r] = sum of packed[t] over t with index[t] == r, in ascending t; zeros if there are none. Bitwise reproducible
  // for any number of threads.
  void (*scatter_fwd)(const Tensor& packed,  // [T, E]
                      const Tensor& index,   // [T] int64 in [-1, R)
                      // outputs
                      const Tensor& out,  // [R, E]
                      int num_threads);

  // Pixels to tokens of patches, or back (`inverse`, x and out exchanged). Image n is [t temporal, C, h patch, w
  // patch], its tokens are ordered by t, then by blocks of merge x merge patches, then inside the block; a token is [C,
  // temporal, patch, patch].
  void (*patchify_fwd)(const Tensor& x,       // [P], the pixels of all images
                       const Tensor& grid,    // [N, 3] int64: t, h, w in patches
                       const Tensor& starts,  // [N+1] int64: the first token of each image
                       int channels, int patch, int temporal, int merge, bool inverse,
                       // outputs
                       const Tensor& out,  // [T C temporal patch^2]
                       int num_threads);

  // The same, reading separate images in place.
  void (*patchify_images_fwd)(const Tensor& addresses,  // [N] int64: address of each image's first pixel
                              const Tensor& grid,       // as above
                              const Tensor& starts,     // as above
                              int channels, int patch, int temporal, int merge,
                              // outputs
                              const Tensor& out,  // [T C temporal patch^2]
                              int num_threads);

  // Positions in time, height and width. Text tokens count up; the tokens of span n, a grid of extent[n] that begins at
  // token starts[n], have its start position plus their grid coordinates. gained[n] is the position advance of the
  // spans before n minus their token count.
  void (*mrope_fwd)(const Tensor& cu_seqlens,  // [S+1] int64, from 0, non-decreasing, last <= T
                    const Tensor& starts,      // [N] int64, ascending; disjoint spans, each within one segment
                    const Tensor& extent,      // [N, 3] int64: t, h, w in tokens
                    const Tensor& gained,      // [N+1] int64
                    // outputs
                    const Tensor& out,  // [3, T] int64
                    int num_threads);
};
MMK_DECLARE_KERNELS(PackingKernels, packing)

struct PoolingKernels {
  // out[s] = sum, mean, max or first row of x[cu_seqlens[s] : cu_seqlens[s+1]]; zeros for an empty segment. Rows past
  // cu_seqlens[S] belong to no segment. Bitwise reproducible for any number of threads.
  void (*segment_pool_fwd)(const Tensor& x,           // [T, E]
                           const Tensor& cu_seqlens,  // [S+1] int32, from 0, non-decreasing, last <= T
                           PoolMode mode,
                           // outputs
                           const Tensor& out,     // [S, E]
                           const Tensor& argmax,  // [S, E] int32 for max, else not given: the row of x that won (the
                                                  // first of equals; NaN beats numbers), -1 in empty segments
                           int num_threads);

  // grad_x[t]: grad_out[s] for sum, divided by the segment's length for mean, at its first row for first, at
  // argmax[s] for max; zeros elsewhere and in rows of no segment.
  void (*segment_pool_bwd)(const Tensor& grad_out,    // [S, E]
                           const Tensor& cu_seqlens,  // [S+1] int32
                           const Tensor& argmax,      // [S, E] int32 for max, else not given
                           PoolMode mode,
                           // outputs
                           const Tensor& grad_x,  // [T, E]
                           int num_threads);

  // out[s] = sum of weights[t] x[t] over the rows of segment s
  void (*weighted_pool_fwd)(const Tensor& x,           // [T, E]
                            const Tensor& weights,     // [T] float32, float64 for float64 rows
                            const Tensor& cu_seqlens,  // [S+1] int32
                            // outputs
                            const Tensor& out,  // [S, E]
                            int num_threads);

  // grad_x[t] = weights[t] grad_out[s], grad_weights[t] = <x[t], grad_out[s]>; zeros in rows of no segment.
  void (*weighted_pool_bwd)(const Tensor& grad_out,    // [S, E]
                            const Tensor& x,           // [T, E]
                            const Tensor& weights,     // [T]
                            const Tensor& cu_seqlens,  // [S+1] int32
                            // outputs
                            const Tensor& grad_x,        // [T, E]
                            const Tensor& grad_weights,  // [T]
                            int num_threads);
};
MMK_DECLARE_KERNELS(PoolingKernels, pooling)

// CUDA: the same on a stream (a cudaStream_t), without synchronisation. float32, bfloat16, float16.
void launch_packing_gather_fwd_cuda(const Tensor& first, const Tensor& second, const Tensor& third,
                                    const Tensor& fourth, const Tensor& index, const Tensor& out, void* stream);

void launch_packing_patchify_fwd_cuda(const Tensor& x, const Tensor& grid, const Tensor& starts, int channels,
                                      int patch, int temporal, int merge, bool inverse, const Tensor& out,
                                      void* stream);

// The scatter also takes its index grouped by row, so that each row has one owner and a fixed summation order: out[r] =
// sum of packed[order[k]] for k in [starts[r], starts[r+1]), in ascending k.
constexpr int kScatterChunk = 32;
void launch_packing_scatter_fwd_cuda(
    const Tensor& packed,  // [T, E]
    const Tensor& index,   // [T] int64
    const Tensor& order,   // [T] int64: stable argsort of index
    const Tensor& starts,  // [R+1] int64 into order (entries of -1 come before starts[0])
    const Tensor& sums,    // [T / kScatterChunk, E] float32: scratch for the sums of chunks of `order`
    // outputs
    const Tensor& out,  // [R, E]
    void* stream);

void launch_packing_mrope_fwd_cuda(const Tensor& cu_seqlens, const Tensor& starts, const Tensor& extent,
                                   const Tensor& gained, const Tensor& out, void* stream);

void launch_packing_segment_pool_fwd_cuda(const Tensor& x, const Tensor& cu_seqlens, PoolMode mode, const Tensor& out,
                                          const Tensor& argmax, void* stream);

void launch_packing_segment_pool_bwd_cuda(const Tensor& grad_out, const Tensor& cu_seqlens, const Tensor& argmax,
                                          PoolMode mode, const Tensor& grad_x, void* stream);

void launch_packing_weighted_pool_fwd_cuda(const Tensor& x, const Tensor& weights, const Tensor& cu_seqlens,
                                           const Tensor& out, void* stream);

void launch_packing_weighted_pool_bwd_cuda(const Tensor& grad_out, const Tensor& x, const Tensor& weights,
                                           const Tensor& cu_seqlens, const Tensor& grad_x, const Tensor& grad_weights,
                                           void* stream);

}  // namespace mmk
