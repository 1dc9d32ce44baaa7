// Moving rows on CPU: whole, each output row written once by one thread.
#include "packing/packing.h"

#include <type_traits>

#include "common/parallel.h"
#include "packing/packing_mrope.h"
#include "packing/packing_sums.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// The sources of a gather, end to end.
class Sources {
 public:
  explicit Sources(const Tensor* const (&parts)[4]) {
    for (const Tensor* part : parts) {
      if (!part->given()) break;
      readers_[count_] = RowReader(*part);
      rows_[count_++] = part->size[0];
    }
  }
  // The row of that number, or null for -1.
  MMK_INLINE const void* row(int64_t i) const {
    if (i < 0) return nullptr;
    int k = 0;
    for (; k + 1 < count_ && i >= rows_[k]; ++k) i -= rows_[k];
    return readers_[k].row(i);
  }

 private:
  RowReader readers_[4];
  int64_t rows_[4];
  int count_ = 0;
};

void gather_fwd(const Tensor& first, const Tensor& second, const Tensor& third, const Tensor& fourth,
                const Tensor& index, const Tensor& out, int num_threads) {
  const int64_t row_bytes = first.size[1] * element_bytes(first.dtype);
  const int64_t* at = index.ptr<const int64_t>();
  const Sources from({&first, &second, &third, &fourth});
  const RowWriter to(out.data, index.size[0], row_bytes);
  parallel_chunks(index.size[0], num_threads, [&](int64_t begin, int64_t end, int) {
    const void* row = begin < end ? from.row(at[begin]) : nullptr;
    for (int64_t t = begin; t < end; ++t) {
      // The rows are scattered, so the hardware cannot foresee where the next one begins.
      const void* next = t + 1 < end ? from.row(at[t + 1]) : nullptr;
      if (next != nullptr) __builtin_prefetch(next);
      to.write(t, row);
      row = next;
    }
    to.finish();
  });
}

template <class T>
void scatter(const Tensor& packed, const Tensor& index, const Tensor& out, int num_threads) {
  using C = ComputeOf<T>;
  const int64_t rows_in = index.size[0], R = out.size[0], E = out.size[1];
  const int64_t* at = index.ptr<const int64_t>();
  // Counting sort of the packed rows by the row they add to; entries of -1 are left out. While the entries are placed,
  // begin[r + 1] moves from the first entry of row r past its last, so that begin[r] ends up where row r begins.
  AlignedBuffer<int64_t> begin_buffer(R + 2), order_buffer(rows_in);
  int64_t *begin = begin_buffer.data(), *order = order_buffer.data();
  __builtin_memset(begin, 0, static_cast<size_t>(R + 2) * sizeof(int64_t));
  for (int64_t t = 0; t < rows_in; ++t)
    if (at[t] >= 0) ++begin[at[t] + 2];
  for (int64_t r = 2; r < R + 2; ++r) begin[r] += begin[r - 1];
  for (int64_t t = 0; t < rows_in; ++t)
    if (at[t] >= 0) order[begin[at[t] + 1]++] = t;

  const RowReader from(packed);
  const RowWriter to(out.data, R, E * static_cast<int64_t>(sizeof(T)));
  constexpr int64_t kTaskRows = 32;
  AlignedBuffer<C> scratch(usable_threads((R + kTaskRows - 1) / kTaskRows, num_threads) * 4 * E);
  parallel_for((R + kTaskRows - 1) / kTaskRows, num_threads, [&](int64_t task, int thread) {
    C *mine = scratch.data() + thread * 4 * E, *total = mine + 2 * E;
    T* rounded = reinterpret_cast<T*>(mine + 3 * E);
    for (int64_t r = task * kTaskRows; r < least(R, (task + 1) * kTaskRows); ++r) {
      const int64_t *first = order + begin[r], count = begin[r + 1] - begin[r];
      if (count <= 1) {
        to.write(r, count == 1 ? from.row(first[0]) : nullptr);
        continue;
      }
      const auto row = [&](int64_t k) { return static_cast<const T*>(from.row(first[k])); };
      sum_rows<T>(count, E, row, Plain{}, mine, total);
      round_row(total, C(1), E, rounded);
      to.write(r, rounded);
    }
    to.finish();
  });
}

void scatter_fwd(const Tensor& packed, const Tensor& index, const Tensor& out, int num_threads) {
  with_type(packed.dtype,
            [&](auto* t) { scatter<std::remove_pointer_t<decltype(t)>>(packed, index, out, num_threads); });
}

// ---- patches --------------------------------------------------------------------------------------------------------

// Where the lines of one token's patch lie in the pixels; a line is `patch` pixels.
struct PatchPlace {
  int64_t pixel;                 // the first line's
  int64_t line, frame, channel;  // pixels from one line, frame, channel to the next
};

// Tokens of an image of t x h x w patches go by t, then by blocks of merge x merge patches, then inside the block.
MMK_INLINE PatchPlace place_of(const int64_t* grid, int64_t token, int64_t channels, int64_t patch, int64_t temporal,
                               int64_t merge) {
  const int64_t height = grid[1] / merge, width = grid[2] / merge, line = grid[2] * patch;
  const int64_t in_block = token % (merge * merge), block = token / (merge * merge);
  const int64_t x = block % width * merge + in_block % merge;
  const int64_t y = block / width % height * merge + in_block / merge;
  const int64_t t = block / (width * height);
  const int64_t channel = line * grid[1] * patch, frame = channel * channels;
  return {t * temporal * frame + y * patch * line + x * patch, line, frame, channel};
}

// kBytes: of a line, or 0 for the width given.
template <int kBytes, class Move>
MMK_INLINE void each_line(const PatchPlace& place, int64_t channels, int64_t patch, int64_t temporal, int64_t bytes,
                          int64_t element, Move move) {
  const int64_t width = kBytes > 0 ? kBytes : bytes;
  int64_t in_token = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t f = 0; f < temporal; ++f) {
      int64_t pixel = (place.pixel + f * place.frame + c * place.channel) * element;
      for (int64_t i = 0; i < patch; ++i, in_token += width, pixel += place.line * element)
        move(in_token, pixel, width);
    }
}

template <int kBytes>
void move_patches(const Tensor& x, const Tensor& grid, const Tensor& starts, int64_t channels, int64_t patch,
                  int64_t temporal, int64_t merge, bool inverse, const Tensor& out, int num_threads) {
  const int64_t element = element_bytes(x.dtype), row = channels * temporal * patch * patch, images = grid.size[0];
  const int64_t *grids = grid.ptr<const int64_t>(), *first = starts.ptr<const int64_t>();
  const char* from = x.ptr<const char>();
  char* to = out.ptr<char>();
  parallel_chunks(first[images], num_threads, [&](int64_t begin, int64_t end, int) {
    int64_t n = 0;
    for (int64_t token = begin; token < end; ++token) {
      while (token >= first[n + 1]) ++n;
      PatchPlace place = place_of(grids + 3 * n, token - first[n], channels, patch, temporal, merge);
      place.pixel += first[n] * row;
      const int64_t base = token * row * element;
      each_line<kBytes>(place, channels, patch, temporal, patch * element, element,
                        [&](int64_t in_token, int64_t pixel, int64_t width) {
                          if (inverse) {
                            __builtin_memcpy(to + pixel, from + base + in_token, static_cast<size_t>(width));
                          } else {
                            __builtin_memcpy(to + base + in_token, from + pixel, static_cast<size_t>(width));
                          }
                        });
    }
  });
}

void patchify_fwd(const Tensor& x, const Tensor& grid, const Tensor& starts, int channels, int patch, int temporal,
                  int merge, bool inverse, const Tensor& out, int num_threads) {
  const auto run = [&](auto kernel) {
    kernel(x, grid, starts, channels, patch, temporal, merge, inverse, out, num_threads);
  };
  // The usual patches, 14 and 16 pixels wide, as moves of a size known here.
  switch (patch * element_bytes(x.dtype)) {
    case 28:
      return run(move_patches<28>);
    case 32:
      return run(move_patches<32>);
    case 56:
      return run(move_patches<56>);
    case 64:
      return run(move_patches<64>);
    default:
      return run(move_patches<0>);
  }
}

// ---- positions ------------------------------------------------------------------------------------------------------

void mrope_fwd(const Tensor& cu_seqlens, const Tensor& starts, const Tensor& extent, const Tensor& gained,
               const Tensor& out, int num_threads) {
  const MropeSpans spans{cu_seqlens.ptr<const int64_t>(), cu_seqlens.size[0],
                         starts.ptr<const int64_t>(),     starts.size[0],
                         extent.ptr<const int64_t>(),     gained.ptr<const int64_t>()};
  const int64_t T = out.size[1];
  parallel_chunks(T, num_threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) spans.place(t, out.ptr<int64_t>() + t, T);
  });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(PackingKernels, packing) = {&MMK_ISA::gather_fwd, &MMK_ISA::scatter_fwd, &MMK_ISA::patchify_fwd,
                                               &MMK_ISA::mrope_fwd};

}  // namespace mmk
