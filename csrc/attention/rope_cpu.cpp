// Norm and rotary embedding on the CPU: a task is a strip of rows (one token and head each), processed one by one in a
// buffer in the compute type. Each strip sums its weight gradients into its own line of a scratch matrix.
#include "attention/rope.h"

#include "attention/rows.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Elements per strip: 64 KB of bf16, enough to amortise the cost of a task.
constexpr int64_t kStripElements = 32768;

// Rows of [T, H, D], numbered token by token.
template <class T>
struct RowsOf {
  T* data;
  int64_t stride_token, stride_head;
  explicit RowsOf(const Tensor& x) : data(x.ptr<T>()), stride_token(x.stride[0]), stride_head(x.stride[1]) {}
  T* row(int64_t token, int64_t head) const { return data + token * stride_token + head * stride_head; }
};

// Interleaved pairs to two halves, and back.
template <class C>
MMK_INLINE void split_pairs(const C* pairs, int64_t half, C* halves) {
  for (int64_t j = 0; j < half; ++j) {
    halves[j] = pairs[2 * j];
    halves[half + j] = pairs[2 * j + 1];
  }
}
template <class C>
MMK_INLINE void join_pairs(const C* halves, int64_t half, C* pairs) {
  for (int64_t j = 0; j < half; ++j) {
    pairs[2 * j] = halves[j];
    pairs[2 * j + 1] = halves[half + j];
  }
}

// to[d] = from(d), with the first 2 half elements rotated by sign times the angles; from(d, n) returns n elements.
template <class C, class From, class To>
MMK_INLINE void turn(From&& from, To* to, const C* cos, const C* sin, C sign, int64_t half, int64_t dim) {
  each_vector<C>(half, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const auto a = from(j, n), b = from(half + j, n);
    const auto c = read(cos + j, n), s = read(sin + j, n) * sign;
    write(to + j, a * c - b * s, n);
    write(to + half + j, b * c + a * s, n);
  });
  each_vector<C>(dim - 2 * half, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
    write(to + 2 * half + d, from(2 * half + d, n), n);
  });
}

template <class E>
struct Elements {
  const E* data;
  MMK_INLINE Vec<ComputeOf<E>> operator()(int64_t d, int64_t n) const { return read(data + d, n); }
};
template <class E>
MMK_INLINE Elements<E> elements(const E* data) {
  return {data};
}

template <class C>
struct Prologue {
  int64_t tokens, heads, dim, half, table_rows;
  const C *cos, *sin, *weight, *bias;
  Norm norm;
  C eps;
  bool interleaved;

  template <class Args>
  Prologue(const Args& args, const Tensor& x)
      : tokens(x.size[0]),
        heads(x.size[1]),
        dim(x.size[2]),
        half(args.cos.given() ? args.cos.size[1] : 0),
        table_rows(args.cos.given() ? args.cos.size[0] : 1),
        cos(args.cos.template ptr<C>()),
        sin(args.sin.template ptr<C>()),
        weight(args.weight.template ptr<C>()),
        bias(nullptr),
        norm(args.norm),
        eps(static_cast<C>(args.eps)),
        interleaved(args.interleaved) {}

  // c[d] = x[d] - mu; returns r.
  template <class T>
  MMK_INLINE C centre(const T* x, C* c) const {
    const C count = static_cast<C>(dim);
    Vec<C> total = {}, squares = {};
    if (norm == Norm::layer) {
      each_vector<C>(dim, [&](int64_t d, int64_t n) __attribute__((always_inline)) { total += read(x + d, n); });
      const C mean = reduce_add(total) / count;
      each_vector<C>(dim, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
        write(c + d, read(x + d, n) - mean, n);
        const auto v = read(c + d, n);  // again, because of the zeros past the end
        squares += v * v;
      });
    } else {
      each_vector<C>(dim, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
        const auto v = read(x + d, n);
        write(c + d, v, n);
        squares += v * v;
      });
    }
    return 1 / __builtin_sqrt(reduce_add(squares) / count + eps);
  }

  // As `turn`, for either pair layout; `spare` [2, dim] buffers the halves.
  template <class From, class To>
  MMK_INLINE void rotate(From&& from, To* to, int64_t token, C sign, C* spare) const {
    const int64_t line = token % table_rows * half;
    if (!interleaved || half == 0) return turn(from, to, cos + line, sin + line, sign, half, dim);
    C *wide = spare, *halves = spare + padded(dim);
    each_vector<C>(dim, [&](int64_t d, int64_t n) __attribute__((always_inline)) { write(wide + d, from(d, n), n); });
    split_pairs(wide, half, halves);
    turn(elements(halves), halves, cos + line, sin + line, sign, half, 2 * half);
    join_pairs(halves, half, wide);
    each_vector<C>(dim,
                   [&](int64_t d, int64_t n) __attribute__((always_inline)) { write(to + d, read(wide + d, n), n); });
  }
};

template <class T>
void forward(const NormRopeFwdArgs& args, int num_threads) {
  using C = ComputeOf<T>;
  Prologue<C> p(args, args.x);
  p.bias = args.bias.ptr<C>();
  const RowsOf<const T> x(args.x);
  T* const y = args.y.ptr<T>();
  const Strips strips(p.tokens, p.heads * p.dim, kStripElements);
  const int64_t width = padded(p.dim);
  AlignedBuffer<C> memory(usable_threads(strips.count(), num_threads) * 3 * width);
  parallel_for(strips.count(), num_threads, [&](int64_t strip, int thread) {
    C *const row = memory.data() + thread * 3 * width, *const spare = row + width;
    for (int64_t t = strips.begin(strip); t < strips.end(strip); ++t)
      for (int64_t h = 0; h < p.heads; ++h) {
        T* const to = y + (t * p.heads + h) * p.dim;
        if (p.norm == Norm::none) {
          p.rotate(elements(x.row(t, h)), to, t, C(1), spare);
          continue;
        }
        const C r = p.centre(x.row(t, h), row);
        const auto normalised = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
          auto v = read(row + d, n) * r;
          if (p.weight != nullptr) v = v * read(p.weight + d, n);
          if (p.bias != nullptr) v = v + read(p.bias + d, n);
          return v;
        };
        p.rotate(normalised, to, t, C(1), spare);
      }
  });
}

// dx from g (the gradient of n, overwritten) and c = x - mu, h = c r; adds g h and g to the sums.
template <class T, class C>
MMK_INLINE void normalise_bwd(const Prologue<C>& p, C* g, const C* c, C r, C* dweight, C* dbias, T* dx) {
  Vec<C> total = {}, product = {};
  each_vector<C>(p.dim, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
    auto u = read(g + d, n);
    const auto v = read(c + d, n) * r;
    write(dweight + d, read(dweight + d, n) + u * v, n);
    if (p.norm == Norm::layer) write(dbias + d, read(dbias + d, n) + u, n);
    if (p.weight != nullptr) u = u * read(p.weight + d, n);
    write(g + d, u, n);
    total += u;
    product += u * v;
  });
  const C count = static_cast<C>(p.dim);
  const C mean = p.norm == Norm::layer ? reduce_add(total) / count : 0, slope = reduce_add(product) / count * r;
  each_vector<C>(p.dim, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
    write(dx + d, (read(g + d, n) - mean - read(c + d, n) * slope) * r, n);
  });
}

template <class T>
void backward(const NormRopeBwdArgs& args, int num_threads) {
  using C = ComputeOf<T>;
  const Prologue<C> p(args, args.grad_out);
  const RowsOf<const T> grad_out(args.grad_out), x(args.x);
  T* const dx = args.dx.ptr<T>();
  const Strips strips(p.tokens, p.heads * p.dim, kStripElements);
  const int64_t width = padded(p.dim), lines = p.norm == Norm::none ? 0 : strips.count();
  AlignedBuffer<C> memory(usable_threads(strips.count(), num_threads) * 6 * width);
  AlignedBuffer<C> sums(lines * 2 * width);
  parallel_for(strips.count(), num_threads, [&](int64_t strip, int thread) {
    C *const g = memory.data() + thread * 6 * width, *const c = g + width, *const spare = c + width;
    C* const part = spare + 2 * width;  // partial dweight and dbias
    C* const total = sums.data() + strip * 2 * width;
    if (lines > 0)
      for (int64_t d = 0; d < 2 * width; ++d) total[d] = part[d] = 0;
    int64_t rows = 0;
    for (int64_t t = strips.begin(strip); t < strips.end(strip); ++t)
      for (int64_t head = 0; head < p.heads; ++head) {
        T* const to = dx + (t * p.heads + head) * p.dim;
        if (p.norm == Norm::none) {
          p.rotate(elements(grad_out.row(t, head)), to, t, C(-1), spare);
          continue;
        }
        p.rotate(elements(grad_out.row(t, head)), g, t, C(-1), spare);
        const C r = p.centre(x.row(t, head), c);
        normalise_bwd(p, g, c, r, part, part + width, to);
        if (++rows % kRowsPerPart == 0) add_part(part, total, 2 * width);
      }
    if (lines > 0) add_part(part, total, 2 * width);
  });
  if (p.norm == Norm::none) return;
  sum_lines(sums.data(), lines, 2 * width, p.dim, args.dweight.ptr<C>());
  if (p.norm == Norm::layer) sum_lines(sums.data() + width, lines, 2 * width, p.dim, args.dbias.ptr<C>());
}

void forward_any(const NormRopeFwdArgs& args, int num_threads) {
  with_dtype(args.x.dtype, [&](auto t) { forward<decltype(t)>(args, num_threads); });
}

void backward_any(const NormRopeBwdArgs& args, int num_threads) {
  with_dtype(args.grad_out.dtype, [&](auto t) { backward<decltype(t)>(args, num_threads); });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(RopeKernels, rope) = {&MMK_ISA::forward_any, &MMK_ISA::backward_any};

}  // namespace mmk
