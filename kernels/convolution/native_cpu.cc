// The 3 x 3 convolution on CPU and its gradients, in Winograd's form F(2 x 2, 3 x 3) (Lavin and
// Gray 2016): a tile of 2 x 2 outputs takes 16 products in place of 36.
//
//   y = A^T M A,   M = sum over channels of V . U,   V = B^T x B,   U = G w G^T
//
// for tiles x of 4 x 4 inputs. Each of the 16 entries of M is a product of matrices [tiles, inputs]
// and [inputs, outputs]. The gradient of the inputs is a convolution with the kernel turned around;
// that of the kernel is its transpose:
//
//   dw = G^T dU G,   dU = sum over tiles of V . Z,   Z = A dy A^T
//
// Everything is cut so that what a thread works on stays in its second cache: for outputs, a part
// of the kernel, to which blocks of tiles come one after the other; for the kernel's gradient, a
// part of that. What is transformed more than once by this costs little beside the products.

#include "native.h"

namespace ffi = xla::ffi;

namespace scanax {
namespace {

constexpr int kPlaces = 16;  // of a transformed tile
constexpr int kColumns = 64;  // outputs of a part
constexpr int kInputs = 96, kTiles = 36;  // of a part for outputs
constexpr int kRows = 48, kDepth = 64;  // inputs of a part, and tiles, for the kernel's gradient

struct Shape {
  int64_t batch, height, width;
  int in, out;

  int64_t tiles_down() const { return (height + 1) / 2; }
  int64_t tiles_across() const { return (width + 1) / 2; }
  int64_t tiles() const { return batch * tiles_down() * tiles_across(); }
};

// From one 4 x 4 matrix to the next lies an odd number of cache lines, so that no two of the 16
// lie at the same place of the cache.
template <typename T>
size_t apart(size_t size) {
  constexpr size_t line = 64 / sizeof(T);
  return ((size + line - 1) / line | 1) * line;
}

// Calls step(X{}, c) for whole vectors X of channels c, and for single ones X = T after them.
template <typename T, typename Step>
inline void over_channels(int channels, Step step) {
  int c = 0;
  for (; c + kLanes<T> <= channels; c += kLanes<T>) step(Vector<T>{}, c);
  for (; c < channels; ++c) step(T{}, c);
}

template <typename X, typename T>
inline X get(const T* from) {
  X x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename X, typename T>
inline void put(T* to, X x) { std::memcpy(to, &x, sizeof x); }

// Where the upper left output of a tile lies.
struct Place {
  int64_t image, row, column;
};

inline Place place_of(const Shape& shape, int64_t tile) {
  const int64_t across = shape.tiles_across(), down = shape.tiles_down();
  return {tile / (across * down), tile / across % down * 2, tile % across * 2};
}

// V [16, count, padded(channels)]: channels `first` and on of all inputs of `count` tiles.
template <typename T>
void read_inputs(const Shape& shape, const T* x, int64_t tile, int count, int first, int channels,
                 const T* zeros, T* v, size_t v_place) {
  const int row = padded<T>(channels);
  for (int p = 0; p < count; ++p, v += row) {
    const Place at = place_of(shape, tile + p);
    const T* from[4][4];
    for (int i = 0; i < 4; ++i) {
      const int64_t h = at.row + i - 1;
      for (int j = 0; j < 4; ++j) {
        const int64_t w = at.column + j - 1;
        const bool inside = h >= 0 && h < shape.height && w >= 0 && w < shape.width;
        from[i][j] =
            inside ? x + ((at.image * shape.height + h) * shape.width + w) * shape.in + first
                   : zeros;
      }
    }
    over_channels<T>(channels, [&](auto lane, int c) {
      using X = decltype(lane);
      X y[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const X a = get<X>(from[0][j] + c), b = get<X>(from[1][j] + c);
        const X d = get<X>(from[2][j] + c), e = get<X>(from[3][j] + c);
        y[0][j] = a - d;
        y[1][j] = b + d;
        y[2][j] = d - b;
        y[3][j] = b - e;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        T* to = v + 4 * i * v_place + c;
        put<X>(to, y[i][0] - y[i][2]);
        put<X>(to + v_place, y[i][1] + y[i][2]);
        put<X>(to + 2 * v_place, y[i][2] - y[i][1]);
        put<X>(to + 3 * v_place, y[i][1] - y[i][3]);
      }
    });
  }
}

// U [16, channels, padded(width)] of inputs `first_in` and on and outputs `first` and on.
template <typename T>
void read_kernel(const Shape& shape, const T* kernel, bool turned, int first_in, int channels,
                 int first, int width, T* u, size_t u_place) {
  const int64_t in = shape.in, out = shape.out, row = padded<T>(width);
  auto entry = [&](auto lane, int i, int j, int64_t c, int64_t o) {
    using X = decltype(lane);
    if (!turned) return get<X>(kernel + ((3 * i + j) * in + c) * out + o);
    const T* from = kernel + ((8 - 3 * i - j) * out + o) * in + c;
    if constexpr (std::is_same_v<X, T>) {
      return *from;
    } else {
      X x;
#pragma GCC unroll 16
      for (int n = 0; n < kLanes<T>; ++n) x[n] = from[n * in];
      return x;
    }
  };
  over_channels<T>(width, [&](auto lane, int o) {
    using X = decltype(lane);
    const T half = 0.5;
    for (int64_t r = 0; r < channels; ++r) {
      const int64_t c = first_in + r;
      X y[4][3];
      for (int j = 0; j < 3; ++j) {
        const X a = entry(lane, 0, j, c, first + o), b = entry(lane, 1, j, c, first + o);
        const X d = entry(lane, 2, j, c, first + o);
        y[0][j] = a;
        y[1][j] = half * (a + d + b);
        y[2][j] = half * (a + d - b);
        y[3][j] = d;
      }
      for (int i = 0; i < 4; ++i) {
        T* to = u + 4 * i * u_place + r * row + o;
        put<X>(to, y[i][0]);
        put<X>(to + u_place, half * (y[i][0] + y[i][2] + y[i][1]));
        put<X>(to + 2 * u_place, half * (y[i][0] + y[i][2] - y[i][1]));
        put<X>(to + 3 * u_place, y[i][2]);
      }
    }
  });
}

// Outputs `first` and on, `width` of them, of `count` tiles from M [16, count, padded(width)]:
// added to what is there, or in its place.
template <typename T>
void write_outputs(const Shape& shape, const T* m, size_t m_place, int64_t tile, int count,
                   int first, int width, bool add, T* y) {
  const int row = padded<T>(width);
  for (int p = 0; p < count; ++p, m += row) {
    const Place at = place_of(shape, tile + p);
    const bool right = at.column + 1 < shape.width, below = at.row + 1 < shape.height;
    T* to = y + ((at.image * shape.height + at.row) * shape.width + at.column) * shape.out + first;
    const int64_t down = shape.width * shape.out;
    over_channels<T>(width, [&](auto lane, int c) {
      using X = decltype(lane);
      X s[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const T* from = m + j * m_place + c;
        const X a = get<X>(from), b = get<X>(from + 4 * m_place);
        const X d = get<X>(from + 8 * m_place), e = get<X>(from + 12 * m_place);
        s[0][j] = a + b + d;
        s[1][j] = b - d - e;
      }
      auto write = [&](T* at, X value) { put<X>(at, add ? get<X>(at) + value : value); };
      write(to + c, s[0][0] + s[0][1] + s[0][2]);
      if (right) write(to + shape.out + c, s[0][1] - s[0][2] - s[0][3]);
      if (below) write(to + down + c, s[1][0] + s[1][1] + s[1][2]);
      if (right && below) write(to + down + shape.out + c, s[1][1] - s[1][2] - s[1][3]);
    });
  }
}

// Z [16, count, padded(width)] of the cotangents of outputs `first` and on, `width` of them.
template <typename T>
void read_cotangents(const Shape& shape, const T* dy, int64_t tile, int count, int first,
                     int width, const T* zeros, T* z, size_t z_place) {
  const int row = padded<T>(width);
  for (int p = 0; p < count; ++p, z += row) {
    const Place at = place_of(shape, tile + p);
    const bool right = at.column + 1 < shape.width, below = at.row + 1 < shape.height;
    const T* from =
        dy + ((at.image * shape.height + at.row) * shape.width + at.column) * shape.out + first;
    const int64_t down = shape.width * shape.out;
    const T* entries[4] = {from, right ? from + shape.out : zeros, below ? from + down : zeros,
                           right && below ? from + down + shape.out : zeros};
    over_channels<T>(width, [&](auto lane, int c) {
      using X = decltype(lane);
      X s[4][2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const X a = get<X>(entries[j] + c), b = get<X>(entries[2 + j] + c);
        s[0][j] = a;
        s[1][j] = a + b;
        s[2][j] = a - b;
        s[3][j] = -b;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        T* to = z + 4 * i * z_place + c;
        put<X>(to, s[i][0]);
        put<X>(to + z_place, s[i][0] + s[i][1]);
        put<X>(to + 2 * z_place, s[i][0] - s[i][1]);
        put<X>(to + 3 * z_place, -s[i][1]);
      }
    });
  }
}

// dw [3, 3, inputs, outputs] of `rows` inputs and `width` outputs, from dU [16, rows, padded].
template <typename T>
void write_kernel(const Shape& shape, const T* du, size_t du_place, int rows, int width, T* dw) {
  const int row = padded<T>(width);
  const T half = 0.5;
  const int64_t tap = int64_t{shape.in} * shape.out;
  for (int r = 0; r < rows; ++r) {
    over_channels<T>(width, [&](auto lane, int o) {
      using X = decltype(lane);
      X s[3][4];
      for (int j = 0; j < 4; ++j) {
        const T* from = du + j * du_place + r * row + o;
        const X a = get<X>(from), b = half * get<X>(from + 4 * du_place);
        const X d = half * get<X>(from + 8 * du_place), e = get<X>(from + 12 * du_place);
        s[0][j] = a + b + d;
        s[1][j] = b - d;
        s[2][j] = b + d + e;
      }
      for (int i = 0; i < 3; ++i) {
        const X b = half * s[i][1], d = half * s[i][2];
        T* to = dw + 3 * i * tap + r * int64_t{shape.out} + o;
        put<X>(to, s[i][0] + b + d);
        put<X>(to + tap, b - d);
        put<X>(to + 2 * tap, b + d + s[i][3]);
      }
    });
  }
}

// How a number is cut into parts of `size`, the last of which may be smaller.
struct Parts {
  int64_t total, size;

  int64_t count() const { return (total + size - 1) / size; }
  int64_t begin(int64_t i) const { return i * size; }
  int at(int64_t i) const { return std::min(size, total - i * size); }
};

// Tiles in about so many parts, of whole tiles of a product's rows.
Parts rows_in(int64_t tiles, int64_t parts) {
  const int64_t size = (tiles + parts - 1) / std::max<int64_t>(parts, 1);
  return {tiles, std::max<int64_t>(1, (size + kTileRows - 1) / kTileRows) * kTileRows};
}

template <typename T>
void convolve(ffi::ThreadPool& pool, const Shape& shape, bool turned, const T* x, const T* kernel,
              T* y) {
  const Parts ins{shape.in, kInputs}, outs{shape.out, kColumns};
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t wanted = (2 * threads + outs.count() - 1) / outs.count();
  const Parts groups = rows_in(shape.tiles(), wanted);
  among_threads(pool, groups.count() * outs.count(), [&](const std::function<int64_t()>& next) {
    const int most_in = std::min(shape.in, kInputs), most_out = std::min(shape.out, kColumns);
    const size_t u_place = apart<T>(most_in * padded<T>(most_out));
    const size_t v_place = apart<T>(kTiles * padded<T>(most_in));
    const size_t m_place = apart<T>(kTiles * padded<T>(most_out));
    const Buffer<T> u(kPlaces * u_place, false), v(kPlaces * v_place, false);
    const Buffer<T> m(kPlaces * m_place, false), zeros(most_in);
    for (int64_t i = next(); i >= 0; i = next()) {
      const int64_t group = i / outs.count(), out = i % outs.count();
      const Parts blocks = rows_in(groups.at(group), (groups.at(group) + kTiles - 1) / kTiles);
      const int width = outs.at(out), row = padded<T>(width);
      for (int64_t in = 0; in < ins.count(); ++in) {
        const int depth = ins.at(in), v_row = padded<T>(depth);
        read_kernel<T>(shape, kernel, turned, ins.begin(in), depth, outs.begin(out), width, u,
                       u_place);
        for (int64_t block = 0; block < blocks.count(); ++block) {
          const int64_t tile = groups.begin(group) + blocks.begin(block);
          const int count = blocks.at(block);
          read_inputs<T>(shape, x, tile, count, ins.begin(in), depth, zeros, v, v_place);
          for (int place = 0; place < kPlaces; ++place) {
            product<T>(count, row, depth, plain<T>(v + place * v_place, v_row),
                       u + place * u_place, row, 0, m + place * m_place, row);
          }
          write_outputs<T>(shape, m, m_place, tile, count, outs.begin(out), width, in > 0, y);
        }
      }
    }
  });
}

template <typename T>
void kernel_gradient(ffi::ThreadPool& pool, const Shape& shape, const T* x, const T* dy, T* dw) {
  const Parts ins{shape.in, kRows}, outs{shape.out, kColumns}, blocks{shape.tiles(), kDepth};
  const int64_t parts = ins.count() * outs.count();
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t wanted = (4 * threads + parts - 1) / parts;
  const int64_t groups = std::min(blocks.count(), wanted);
  const int64_t size = int64_t{9} * shape.in * shape.out;
  const Buffer<T> others((groups - 1) * size, false);  // dw of all groups but the first
  among_threads(pool, groups * parts, [&](const std::function<int64_t()>& next) {
    const int most_in = std::min(shape.in, kRows), most_out = std::min(shape.out, kColumns);
    const size_t v_place = apart<T>(kDepth * padded<T>(most_in));
    const size_t z_place = apart<T>(kDepth * padded<T>(most_out));
    const size_t du_place = apart<T>(most_in * padded<T>(most_out));
    const Buffer<T> v(kPlaces * v_place, false), z(kPlaces * z_place, false);
    const Buffer<T> du(kPlaces * du_place, false), zeros(std::max(most_in, most_out));
    for (int64_t i = next(); i >= 0; i = next()) {
      const int64_t group = i / parts, in = i / outs.count() % ins.count(), out = i % outs.count();
      const int rows = ins.at(in), v_row = padded<T>(rows);
      const int width = outs.at(out), z_row = padded<T>(width);
      const int64_t first = blocks.count() * group / groups;
      const int64_t end = blocks.count() * (group + 1) / groups;
      for (int64_t b = first; b < end; ++b) {
        const int64_t tile = blocks.begin(b);
        const int count = blocks.at(b);
        read_inputs<T>(shape, x, tile, count, ins.begin(in), rows, zeros, v, v_place);
        read_cotangents<T>(shape, dy, tile, count, outs.begin(out), width, zeros, z, z_place);
        for (int place = 0; place < kPlaces; ++place) {
          product<T>(rows, z_row, count, transposed<T>(v + place * v_place, v_row),
                     z + place * z_place, z_row, b > first, du + place * du_place, z_row);
        }
      }
      T* to = group == 0 ? dw : others + (group - 1) * size;
      write_kernel<T>(shape, du, du_place, rows, width,
                      to + ins.begin(in) * shape.out + outs.begin(out));
    }
  });
  for (int64_t group = 1; group < groups; ++group) {
    const T* from = others + (group - 1) * size;
    for (int64_t i = 0; i < size; ++i) dw[i] += from[i];
  }
}

Shape shape_of(ffi::AnyBuffer x, int64_t out) {
  auto d = x.dimensions();
  return {d[0], d[1], d[2], int(d[3]), int(out)};
}

ffi::Error forward(ffi::ThreadPool pool, bool turned, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                   ffi::Result<ffi::AnyBuffer> y) {
  return by_type(x, [&](auto zero) {
    using T = decltype(zero);
    T* to = part<T>(*y, 0, 0);
    if (x.element_count() == 0 || y->element_count() == 0) {
      std::fill(to, to + y->element_count(), zero);
    } else {
      convolve<T>(pool, shape_of(x, y->dimensions()[3]), turned, part<T>(x, 0, 0),
                  part<T>(kernel, 0, 0), to);
    }
  });
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                    ffi::Result<ffi::AnyBuffer> dw) {
  return by_type(x, [&](auto zero) {
    using T = decltype(zero);
    T* to = part<T>(*dw, 0, 0);
    if (x.element_count() == 0 || dy.element_count() == 0) {
      std::fill(to, to + dw->element_count(), zero);
    } else {
      kernel_gradient<T>(pool, shape_of(x, dy.dimensions()[3]), part<T>(x, 0, 0),
                         part<T>(dy, 0, 0), to);
    }
  });
}

}  // namespace
}  // namespace scanax

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution, scanax::forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("turned")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_kernel, scanax::backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
