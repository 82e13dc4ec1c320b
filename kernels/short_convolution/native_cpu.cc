// The short causal convolution and its gradients; `xla.py` is the definition.
//
// Rows of [T, D] are cut into spans of tokens and parts of at most kColumns channels, which threads
// take one after the other. Within one, tokens go by in order: what a token needs of those before it
// is still in the first cache, and memory is read and written once. The backward keeps the
// derivatives dc before the activation of the last W tokens: with that of token u come the kernel's
// gradients of its taps, and the input's gradient of token u - W + 1, which no later token sees.

#include <numeric>

#include "native.h"

namespace scanax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kColumns = 512;   // of a part
constexpr int64_t kSpan = 64;       // tokens of a span at least: W - 1 more are computed twice
constexpr int64_t kWork = 1 << 15;  // entries that a thread takes at once, at least

struct Shape {
  int64_t batch, tokens, channels;
  int taps;
};

// What a row has, at the first channel of a part.
template <typename T>
struct Row {
  const T *x, *history;     // history may be null: zeros
  const int32_t* segments;  // may be null: a single one
  const T* zeros;

  // The input of token t >= 1 - W as token u >= t sees it.
  const T* seen(const Shape& shape, int64_t t, int64_t u) const {
    if (segments && segments[std::max<int64_t>(t, 0)] != segments[u]) return zeros;
    if (t >= 0) return x + t * shape.channels;
    return history ? history + (t + shape.taps - 1) * shape.channels : zeros;
  }
};

// Calls body(column, number of channels there) for all of a part; the number is a constant for
// whole vectors.
template <typename T, typename Body>
inline void by_vectors(int64_t width, Body body) {
  int64_t column = 0;
  for (; column + kLanes<T> <= width; column += kLanes<T>) {
    body(column, std::integral_constant<int, kLanes<T>>{});
  }
  if (column < width) body(column, int(width - column));
}

template <typename T, typename Count>
inline Vector<T> load_some(const T* from, Count count) {
  Vector<T> x{};
  std::memcpy(&x, from, count * sizeof(T));
  return x;
}

template <typename T, typename Count>
inline void store_some(T* to, Vector<T> x, Count count) {
  std::memcpy(to, &x, count * sizeof(T));
}

template <typename T>
inline Vector<T> sigmoid(Vector<T> x) {
  const Vector<T> e = exp_nonpositive<T>(x < 0 ? x : -x);
  return (x < 0 ? e : Vector<T>{} + 1) / (1 + e);
}

// sum_i kernel_i tap_i. kTaps is W, or 0 where that is no constant.
template <typename T, int kTaps, typename Count>
inline Vector<T> convolved(int taps, const T* kernel, int64_t kernel_row, const T* const* tap,
                           int64_t column, Count count) {
  Vector<T> sum{};
#pragma GCC unroll 4
  for (int i = 0; i < (kTaps ? kTaps : taps); ++i) {
    sum += load_some(kernel + i * kernel_row + column, count) * load_some(tap[i] + column, count);
  }
  return sum;
}

template <typename T, int kTaps>
void forward_span(const Shape& shape, bool silu, const Row<T>& row, const T* kernel, int64_t width,
                  int64_t first, int64_t end, T* y) {
  std::vector<const T*> tap(shape.taps);
  for (int64_t t = first; t < end; ++t) {
    for (int i = 0; i < shape.taps; ++i) tap[i] = row.seen(shape, t - shape.taps + 1 + i, t);
    T* to = y + t * shape.channels;
    by_vectors<T>(width, [&](int64_t column, auto count) {
      Vector<T> c =
          convolved<T, kTaps>(shape.taps, kernel, shape.channels, tap.data(), column, count);
      if (silu) c *= sigmoid<T>(c);
      store_some<T>(to + column, c, count);
    });
  }
}

// `dkernel` [W, D] is added to; `ring` has room for W parts.
template <typename T, int kTaps>
void backward_span(const Shape& shape, bool silu, const Row<T>& row, const T* kernel, const T* dy,
                   int64_t width, int64_t first, int64_t end, T* dx, T* dkernel, T* dhistory,
                   T* ring) {
  const int taps = shape.taps;
  std::vector<const T*> tap(taps), later(taps);
  for (int64_t u = first; u < end + taps - 1; ++u) {
    if (u < shape.tokens) {
      for (int i = 0; i < taps; ++i) tap[i] = row.seen(shape, u - taps + 1 + i, u);
      const T* from = dy + u * shape.channels;
      T* dc_u = ring + u % taps * kColumns;
      const bool own = u < end;
      by_vectors<T>(width, [&](int64_t column, auto count) {
        Vector<T> dc = load_some(from + column, count);
        if (silu) {
          const Vector<T> c =
              convolved<T, kTaps>(taps, kernel, shape.channels, tap.data(), column, count);
          const Vector<T> s = sigmoid<T>(c);
          dc *= s * (1 + c * (1 - s));
        }
        store_some<T>(dc_u + column, dc, count);
        if (!own) return;
#pragma GCC unroll 4
        for (int i = 0; i < (kTaps ? kTaps : taps); ++i) {
          T* to = dkernel + i * shape.channels + column;
          store_some<T>(to, load_some(to, count) + dc * load_some(tap[i] + column, count), count);
        }
      });
    }
    const int64_t t = u - taps + 1;
    if (t < first && first > 0) continue;
    for (int i = 0; i < taps; ++i) {  // token u - i saw token t by tap i
      const int64_t v = u - i;
      const bool sees = v >= 0 && v < shape.tokens && row.seen(shape, t, v) != row.zeros;
      later[i] = sees ? ring + v % taps * kColumns : row.zeros;
    }
    T* to = t < 0 ? dhistory + (t + taps - 1) * shape.channels : dx + t * shape.channels;
    by_vectors<T>(width, [&](int64_t column, auto count) {
      const Vector<T> sum =
          convolved<T, kTaps>(taps, kernel, shape.channels, later.data(), column, count);
      store_some<T>(to + column, sum, count);
    });
  }
}

// How the work is cut: all spans of all parts of all rows.
struct Cut {
  int64_t parts, spans, items, at_once;

  Cut(const Shape& shape, int64_t threads) {
    parts = (shape.channels + kColumns - 1) / kColumns;
    const int64_t wanted = (4 * threads + shape.batch * parts - 1) / (shape.batch * parts);
    spans = std::clamp<int64_t>(shape.tokens / kSpan, 1, wanted);
    items = shape.batch * parts * spans;
    const int64_t entries = shape.batch * shape.tokens * shape.channels;
    at_once = std::max<int64_t>(1, kWork / std::max<int64_t>(1, entries / items));
  }
};

// Calls work(row, its number, column, width, first token, end, number of the span, room for W parts)
// for all spans.
template <typename T, typename Work>
void for_spans(ffi::ThreadPool& pool, const Shape& shape, const Cut& cut, const T* x,
               const T* history, const int32_t* segments, Work work) {
  const Buffer<T> zeros(kColumns);
  const int64_t turns = (cut.items + cut.at_once - 1) / cut.at_once;
  among_threads(pool, turns, [&](const std::function<int64_t()>& next) {
    const Buffer<T> room(shape.taps * kColumns, false);
    for (int64_t turn = next(); turn >= 0; turn = next()) {
      const int64_t last = std::min(cut.items, (turn + 1) * cut.at_once);
      for (int64_t i = turn * cut.at_once; i < last; ++i) {
        const int64_t column = i % cut.parts * kColumns, span = i / cut.parts % cut.spans;
        const int64_t b = i / cut.parts / cut.spans;
        const Row<T> row{x + b * shape.tokens * shape.channels + column,
                         history ? history + b * (shape.taps - 1) * shape.channels + column
                                 : nullptr,
                         segments ? segments + b * shape.tokens : nullptr, zeros};
        work(row, b, column, std::min(kColumns, shape.channels - column),
             shape.tokens * span / cut.spans, shape.tokens * (span + 1) / cut.spans, span, room);
      }
    }
  });
}

// Calls run(W) with a constant for the usual numbers of taps, else 0.
template <typename Run>
void with_taps(int taps, Run run) {
  if (taps == 4) return run(std::integral_constant<int, 4>{});
  if (taps == 3) return run(std::integral_constant<int, 3>{});
  run(std::integral_constant<int, 0>{});
}

Shape shape_of(ffi::AnyBuffer x, ffi::AnyBuffer kernel) {
  auto d = x.dimensions();  // channels may be several
  const int64_t channels =
      std::accumulate(d.begin() + 2, d.end(), int64_t{1}, std::multiplies<int64_t>());
  return {d[0], d[1], channels, int(kernel.dimensions()[0])};
}

template <typename T>
const T* or_null(ffi::AnyBuffer array) {
  return array.element_count() ? static_cast<const T*>(array.untyped_data()) : nullptr;
}

ffi::Error forward(ffi::ThreadPool pool, bool silu, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                   ffi::AnyBuffer history, ffi::AnyBuffer segments, ffi::Result<ffi::AnyBuffer> y) {
  if (x.element_count() == 0) return ffi::Error::Success();
  return by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Shape shape = shape_of(x, kernel);
    const Cut cut(shape, std::max<int64_t>(1, pool.num_threads()));
    const T* weights = part<T>(kernel, 0, 0);
    T* to = part<T>(*y, 0, 0);
    with_taps(shape.taps, [&](auto taps) {
      for_spans<T>(pool, shape, cut, part<T>(x, 0, 0), or_null<T>(history),
                   or_null<int32_t>(segments),
                   [&](const Row<T>& row, int64_t b, int64_t column, int64_t width, int64_t first,
                       int64_t end, int64_t, T*) {
                     forward_span<T, taps.value>(shape, silu, row, weights + column, width, first,
                                                 end, to + b * shape.tokens * shape.channels + column);
                   });
    });
  });
}

ffi::Error backward(ffi::ThreadPool pool, bool silu, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                    ffi::AnyBuffer history, ffi::AnyBuffer segments, ffi::AnyBuffer dy,
                    ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dkernel,
                    ffi::Result<ffi::AnyBuffer> dhistory) {
  return by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Shape shape = shape_of(x, kernel);
    const int64_t of_row = shape.tokens * shape.channels, of_kernel = shape.taps * shape.channels;
    T* d_weights = part<T>(*dkernel, 0, 0);
    T* d_history = part<T>(*dhistory, 0, 0);
    std::fill_n(d_weights, dkernel->element_count(), zero);
    std::fill_n(d_history, dhistory->element_count(), zero);
    if (x.element_count() == 0) return;
    const Cut cut(shape, std::max<int64_t>(1, pool.num_threads()));
    // The kernel's gradients in all spans of a row but the first.
    const Buffer<T> others(shape.batch * (cut.spans - 1) * of_kernel);
    const T* weights = part<T>(kernel, 0, 0);
    with_taps(shape.taps, [&](auto taps) {
      for_spans<T>(
          pool, shape, cut, part<T>(x, 0, 0), or_null<T>(history), or_null<int32_t>(segments),
          [&](const Row<T>& row, int64_t b, int64_t column, int64_t width, int64_t first,
              int64_t end, int64_t span, T* ring) {
            T* to = span ? others + (b * (cut.spans - 1) + span - 1) * of_kernel
                         : d_weights + b * of_kernel;
            backward_span<T, taps.value>(
                shape, silu, row, weights + column, part<T>(dy, b, of_row) + column, width, first,
                end, part<T>(*dx, b, of_row) + column, to + column,
                d_history + b * (of_kernel - shape.channels) + column, ring);
          });
    });
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t span = 0; span < cut.spans - 1; ++span) {
        const T* from = others + (b * (cut.spans - 1) + span) * of_kernel;
        for (int64_t i = 0; i < of_kernel; ++i) d_weights[b * of_kernel + i] += from[i];
      }
    }
  });
}

template <int kInputs, int kOutputs>
auto with() {
  return with_arrays<kInputs, kOutputs>(
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("silu"));
}

}  // namespace
}  // namespace scanax

XLA_FFI_DEFINE_HANDLER_SYMBOL(short_convolution, scanax::forward, (scanax::with<4, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(short_convolution_backward, scanax::backward, (scanax::with<5, 3>()));
