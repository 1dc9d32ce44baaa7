// Moving rows on CPU: each output row is written once, by one thread.
#include "packing/packing.h"

#include <type_traits>

#include "common/parallel.h"
#include "packing/packing_mrope.h"
#include "packing/packing_sums.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// The concatenated sources of a gather.
class Sources {
 public:
  explicit Sources(const Tensor* const (&parts)[4]) {
    for (const Tensor* part : parts) {
      if (!part->given()) break;
      readers_[count_] = RowReader(*part);
      rows_[count_++] = part->size[0];
    }
  }
  // Row i, or null for -1.
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

constexpr int64_t kRowsAhead = 2;  // scattered rows are streams too short for the hardware prefetcher

void gather_fwd(const Tensor& first, const Tensor& second, const Tensor& third, const Tensor& fourth,
                const Tensor& index, const Tensor& out, int num_threads) {
  const int64_t row_bytes = first.size[1] * element_bytes(first.dtype);
  const int64_t* at = index.ptr<const int64_t>();
  const Sources from({&first, &second, &third, &fourth});
  const RowWriter to(out.data, index.size[0], row_bytes);
  parallel_chunks(index.size[0], num_threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      to.write(t, from.row(at[t]), t + kRowsAhead < end ? from.row(at[t + kRowsAhead]) : nullptr);
    to.finish();
  });
}

template <class T>
void scatter(const Tensor& packed, const Tensor& index, const Tensor& out, int num_threads) {
  using C = ComputeOf<T>;
  const int64_t rows_in = index.size[0], R = out.size[0], E = out.size[1];
  const int64_t* at = index.ptr<const int64_t>();
  // Counting sort of the packed rows by target row; entries of -1 are dropped. During placement begin[r + 1] advances
  // from the first entry of row r past its last, so that begin[r] ends up at the start of row r.
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
        const int64_t later = begin[r] + count;
        const void* next = later < begin[R] ? from.row(order[later]) : nullptr;
        to.write(r, count == 1 ? from.row(first[0]) : nullptr, next);
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
  with_dtype(packed.dtype, [&](auto t) { scatter<decltype(t)>(packed, index, out, num_threads); });
}

// ---- patches --------------------------------------------------------------------------------------------------------

// Location of one token's patch lines in the pixels; a line is `patch` pixels.
struct PatchPlace {
  int64_t pixel;                 // of the first line
  int64_t line, frame, channel;  // strides in pixels
};

// Tokens of an image of t x h x w patches are ordered by t, then by blocks of merge x merge patches, then inside the
// block.
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

// Tokens assembled in cache and then written together, so that they fill whole cache lines.
MMK_INLINE int64_t tokens_at_once(int64_t row_bytes) {
  int64_t n = 1;
  while (n * row_bytes % 64 != 0 || n * row_bytes < 16384) n *= 2;
  return n;
}

// pixels [N]: image addresses. kBytes: bytes per line, or 0 if not known at compile time.
template <int kBytes>
void move_patches(const int64_t* pixels, const Tensor& grid, const Tensor& starts, int64_t channels, int64_t patch,
                  int64_t temporal, int64_t merge, bool inverse, const Tensor& tokens, int num_threads) {
  const int64_t element = element_bytes(tokens.dtype), width = kBytes > 0 ? kBytes : patch * element;
  const int64_t row = channels * temporal * patch * width;
  const int64_t *grids = grid.ptr<const int64_t>(), *first = starts.ptr<const int64_t>();
  // Calls move(image line, its byte offset in the tokens, the corresponding line in the next row of patches) for every
  // line of tokens [begin, end).
  const auto each_line = [&](int64_t begin, int64_t end, auto move) {
    int64_t n = 0, in_tokens = begin * row;
    for (int64_t token = begin; token < end; ++token) {
      while (token >= first[n + 1]) ++n;
      const PatchPlace place = place_of(grids + 3 * n, token - first[n], channels, patch, temporal, merge);
      char* image = reinterpret_cast<char*>(pixels[n]) + place.pixel * element;
      const int64_t stride = place.line * element, below = merge * patch * stride;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t f = 0; f < temporal; ++f) {
          char* line = image + (f * place.frame + c * place.channel) * element;
          for (int64_t i = 0; i < patch; ++i, in_tokens += width, line += stride) move(line, in_tokens, line + below);
        }
    }
  };
  char* rows = tokens.ptr<char>();
  if (inverse) {
    parallel_chunks(first[grid.size[0]], num_threads, [&](int64_t begin, int64_t end, int) {
      each_line(begin, end, [&](char* line, int64_t in_tokens, const char*) {
        __builtin_memcpy(line, rows + in_tokens, static_cast<size_t>(width));
      });
    });
    return;
  }
  const int64_t at_once = tokens_at_once(row), groups = first[grid.size[0]] / at_once;
  const RowWriter to(rows, groups, at_once * row);
  AlignedBuffer<char> composed(usable_threads(groups, num_threads) * at_once * row);
  parallel_chunks(groups, num_threads, [&](int64_t begin, int64_t end, int thread) {
    char* mine = composed.data() + thread * at_once * row;
    for (int64_t g = begin; g < end; ++g) {
      each_line(g * at_once, (g + 1) * at_once, [&](const char* line, int64_t in_tokens, const char* ahead) {
        __builtin_prefetch(ahead);
        __builtin_memcpy(mine + in_tokens - g * at_once * row, line, static_cast<size_t>(width));
      });
      to.write(g, mine);
    }
    to.finish();
  });
  each_line(groups * at_once, first[grid.size[0]], [&](const char* line, int64_t in_tokens, const char*) {
    __builtin_memcpy(rows + in_tokens, line, static_cast<size_t>(width));
  });
}

void choose_patches(const int64_t* pixels, const Tensor& grid, const Tensor& starts, int channels, int patch,
                    int temporal, int merge, bool inverse, const Tensor& tokens, int num_threads) {
  const auto run = [&](auto kernel) {
    kernel(pixels, grid, starts, channels, patch, temporal, merge, inverse, tokens, num_threads);
  };
  // Compile-time line sizes for the usual patch widths of 14 and 16 pixels.
  switch (patch * element_bytes(tokens.dtype)) {
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

void patchify_fwd(const Tensor& x, const Tensor& grid, const Tensor& starts, int channels, int patch, int temporal,
                  int merge, bool inverse, const Tensor& out, int num_threads) {
  const Tensor &pixels = inverse ? out : x, &tokens = inverse ? x : out;
  const int64_t row_bytes = int64_t{channels} * temporal * patch * patch * element_bytes(x.dtype);
  AlignedBuffer<int64_t> addresses(grid.size[0]);
  for (int64_t n = 0; n < grid.size[0]; ++n)
    addresses.data()[n] = reinterpret_cast<int64_t>(pixels.data) + starts.ptr<const int64_t>()[n] * row_bytes;
  choose_patches(addresses.data(), grid, starts, channels, patch, temporal, merge, inverse, tokens, num_threads);
}

void patchify_images_fwd(const Tensor& addresses, const Tensor& grid, const Tensor& starts, int channels, int patch,
                         int temporal, int merge, const Tensor& out, int num_threads) {
  const int64_t* pixels = addresses.ptr<const int64_t>();
  choose_patches(pixels, grid, starts, channels, patch, temporal, merge, false, out, num_threads);
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
                                               &MMK_ISA::patchify_images_fwd, &MMK_ISA::mrope_fwd};

}  // namespace mmk
