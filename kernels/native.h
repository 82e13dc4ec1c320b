// What the kernels for CPU share: vectors, products of small matrices, and work among threads.
//
// Matrices are row-major. Rows of a right factor and of a result are padded to whole vectors
// (`padded`). What pads them is never a row of a right factor, so that it stays in the padding.

#ifndef SCANAX_KERNELS_NATIVE_H_
#define SCANAX_KERNELS_NATIVE_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace scanax {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;  // of a row of a tile: 6 x 4 sums, 4 factors; 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;  // 6 x 2 sums, 2 factors; 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 4;
#endif
constexpr int kTileRows = 6;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T>
inline int padded(int width) {
  return (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename T>
inline void store(T* to, Vector<T> x) {
  std::memcpy(to, &x, sizeof x);
}

// Memory that begins at a whole vector; zeroed, unless all that is read is written before.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size, bool zeroed = true)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {
    if (zeroed) std::memset(data_, 0, size * sizeof(T));
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

template <typename T, int kRows, int kVectors>
inline void tile(int depth, const T* a, ptrdiff_t a_row, ptrdiff_t a_column, const T* b,
                 ptrdiff_t b_row, T keep, T* c, ptrdiff_t c_row) {
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = keep == 0 ? Vector<T>{} : keep * load<T>(c + r * c_row + v * kLanes<T>);
    }
  }
  for (int p = 0; p < depth; ++p, a += a_column, b += b_row) {
    Vector<T> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load<T>(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T left = a[r * a_row];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes<T>, sum[r][v]);
  }
}

// A matrix as the left factor of a product: entry (r, p) lies at r * row + p * column.
template <typename T>
struct Left {
  const T* data;
  ptrdiff_t row, column;
};

template <typename T>
inline Left<T> plain(const T* data, ptrdiff_t row) { return {data, row, 1}; }

template <typename T>
inline Left<T> transposed(const T* data, ptrdiff_t row) { return {data, 1, row}; }

template <typename T, int kVectors>
void columns(int rows, int depth, Left<T> a, const T* b, ptrdiff_t b_row, T keep, T* c,
             ptrdiff_t c_row) {
  auto tiles = [&](auto size, int count) {
    for (; count > 0; --count) {
      tile<T, size.value, kVectors>(depth, a.data, a.row, a.column, b, b_row, keep, c, c_row);
      a.data += size.value * a.row;
      c += size.value * c_row;
    }
  };
  tiles(std::integral_constant<int, kTileRows>{}, rows / kTileRows);
  rows %= kTileRows;
  tiles(std::integral_constant<int, 4>{}, rows / 4);
  rows %= 4;
  tiles(std::integral_constant<int, 2>{}, rows / 2);
  tiles(std::integral_constant<int, 1>{}, rows % 2);
}

// C = keep C + A B. C [rows, width] is not read for keep = 0; A [rows, depth]; B [depth, width].
template <typename T>
void product(int rows, int width, int depth, Left<T> a, const T* b, ptrdiff_t b_row, T keep, T* c,
             ptrdiff_t c_row) {
  int vectors = padded<T>(width) / kLanes<T>;
  auto blocks = [&](auto size) {
    for (; vectors >= size.value; vectors -= size.value) {
      columns<T, size.value>(rows, depth, a, b, b_row, keep, c, c_row);
      b += size.value * kLanes<T>;
      c += size.value * kLanes<T>;
    }
  };
  blocks(std::integral_constant<int, kTileVectors>{});
  blocks(std::integral_constant<int, 2>{});
  blocks(std::integral_constant<int, 1>{});
}

template <typename T, int kHalf, size_t... kLane>
inline Vector<T> zipped(Vector<T> a, Vector<T> b, std::index_sequence<kLane...>) {
  constexpr int kFirst = kHalf * kLanes<T> / 2;
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes<T>)...);
}

// B [columns, rows] = the transpose of A [rows, columns], in whole vectors both ways: rows of A
// beyond `rows` are taken as zero, and B has padded<T>(columns) rows.
template <typename T>
void transpose(int rows, int columns, const T* a, ptrdiff_t a_row, T* b, ptrdiff_t b_row) {
  constexpr int n = kLanes<T>;
  constexpr auto lanes = std::make_index_sequence<n>{};
  for (int i = 0; i < rows; i += n) {
    for (int j = 0; j < columns; j += n) {
      Vector<T> x[n], y[n];
      for (int r = 0; r < n; ++r) {
        x[r] = i + r < rows ? load<T>(a + (i + r) * a_row + j) : Vector<T>{};
      }
      for (int step = 1; step < n; step *= 2) {  // a perfect shuffle, log2(n) times
        for (int r = 0; r < n / 2; ++r) {
          y[2 * r] = zipped<T, 0>(x[r], x[r + n / 2], lanes);
          y[2 * r + 1] = zipped<T, 1>(x[r], x[r + n / 2], lanes);
        }
        std::copy(y, y + n, x);
      }
      for (int r = 0; r < n; ++r) store(b + (j + r) * b_row + i, x[r]);
    }
  }
}

// Copies rows of `width` entries into padded ones, times a factor.
template <typename T>
void read_rows(int rows, int width, const T* from, ptrdiff_t from_row, T factor, T* to,
               ptrdiff_t to_row) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; ++i) to[r * to_row + i] = factor * from[r * from_row + i];
  }
}

// The reverse.
template <typename T>
void write_rows(int rows, int width, const T* from, ptrdiff_t from_row, T factor, T* to,
                ptrdiff_t to_row) {
  read_rows(rows, width, from, from_row, factor, to, to_row);
}

// `to` = factor * `from`, which may be the same.
template <typename T>
inline void scale_row(T factor, const T* from, T* to, int width) {
  for (int i = 0; i < width; i += kLanes<T>) store<T>(to + i, factor * load<T>(from + i));
}

// exp(x) for x <= 0, to two units in the last place; in float32 0 below -87, near its smallest.
template <typename T>
inline Vector<T> exp_nonpositive(Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    typedef uint32_t Integers __attribute__((vector_size(kVectorBytes)));
    // x = n log 2 + y, |y| <= log(2) / 2; adding 1.5 * 2^23 rounds n into the low bits.
    const Vector<T> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const Vector<T> y = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector<T> p = 1.98756915e-4f * y + 1.39819995e-3f;
    p = p * y + 8.33345190e-3f;
    p = p * y + 4.16657959e-2f;
    p = p * y + 1.66666655e-1f;
    p = p * y + 5.00000012e-1f;
    p = p * y * y + y + 1.0f;
    Integers bits;
    std::memcpy(&bits, &p, sizeof p);
    Integers power;
    std::memcpy(&power, &shifted, sizeof power);
    bits += power << 23;  // times 2^n
    Vector<T> result;
    std::memcpy(&result, &bits, sizeof result);
    result = x != x ? x : result;
    return x < -87.0f ? Vector<T>{} : result;
  } else {
    Vector<T> result;
    for (int lane = 0; lane < kLanes<T>; ++lane) result[lane] = std::exp(x[lane]);
    return result;
  }
}

template <typename T>
T dot(const T* a, const T* b, int size) {
  Vector<T> sums[4] = {};
  int i = 0;
  for (; i + 4 * kLanes<T> <= size; i += 4 * kLanes<T>) {
    for (int v = 0; v < 4; ++v) {
      sums[v] += load<T>(a + i + v * kLanes<T>) * load<T>(b + i + v * kLanes<T>);
    }
  }
  for (; i < size; i += kLanes<T>) sums[0] += load<T>(a + i) * load<T>(b + i);
  const Vector<T> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += all[lane];
  return sum;
}

// Calls work(next) on several threads, this one among them. next() gives every number below
// `items` to one of them, and then -1. Returns when all is done; rethrows what was thrown.
inline void among_threads(xla::ffi::ThreadPool& pool, int64_t items,
                          std::function<void(const std::function<int64_t()>&)> work) {
  struct State {
    std::function<void(const std::function<int64_t()>&)> work;
    int64_t items;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable idle;
    int working = 0;
    bool closed = false;
    std::exception_ptr error;
  };
  auto state = std::make_shared<State>();
  state->work = std::move(work);
  state->items = items;
  auto run = [state] {
    try {
      state->work([state = state.get()] {
        const int64_t item = state->next++;
        return item < state->items ? item : -1;
      });
    } catch (...) {
      std::lock_guard<std::mutex> lock(state->mutex);
      state->error = std::current_exception();
      state->next = state->items;
    }
  };
  // A thread that comes when everything is taken finds the door closed: this one never waits for
  // a thread that has not begun, which the pool may have none to spare for.
  auto helper = [state, run] {
    {
      std::lock_guard<std::mutex> lock(state->mutex);
      if (state->closed) return;
      ++state->working;
    }
    run();
    std::lock_guard<std::mutex> lock(state->mutex);
    if (--state->working == 0) state->idle.notify_all();
  };
  try {
    for (int64_t t = 1; t < std::min(pool.num_threads(), items); ++t) {
      pool.Schedule(std::function<void()>(helper));
    }
  } catch (const std::bad_alloc&) {
    // Those that have been found do the work.
  }
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->closed = true;
  state->idle.wait(lock, [&] { return state->working == 0; });
  if (state->error) std::rethrow_exception(state->error);
}

// Pointers to what row b and head h have of an array [B, ..., H, width]; null for an empty array.
template <typename T>
T* of_head(xla::ffi::AnyBuffer array, int64_t batch, int64_t b, int64_t h, int64_t width) {
  if (array.element_count() == 0) return nullptr;
  return static_cast<T*>(array.untyped_data()) + array.element_count() / batch * b + h * width;
}

// The index-th of the parts of an array, which are `size` long.
template <typename T>
T* part(xla::ffi::AnyBuffer array, int64_t index, int64_t size) {
  return static_cast<T*>(array.untyped_data()) + index * size;
}

template <int kInputs, int kOutputs, typename Binding>
auto with_arrays(Binding binding) {
  if constexpr (kInputs > 0) {
    return with_arrays<kInputs - 1, kOutputs>(
        std::move(binding).template Arg<xla::ffi::AnyBuffer>());
  } else if constexpr (kOutputs > 1) {
    return with_arrays<0, kOutputs - 1>(std::move(binding).template Ret<xla::ffi::AnyBuffer>());
  } else {
    return std::move(binding).template Ret<xla::ffi::AnyBuffer>();
  }
}

// What XLA hands to a scan: the threads, the three attributes, and arrays in the order of the
// handler's parameters.
template <int kInputs, int kOutputs>
auto scan_with() {
  return with_arrays<kInputs, kOutputs>(xla::ffi::Ffi::Bind()
                                            .Ctx<xla::ffi::ThreadPool>()
                                            .Attr<double>("scale")
                                            .Attr<int64_t>("chunk")
                                            .Attr<int64_t>("stride"));
}

// Calls run(T{}) for the type T of an array; exceptions become errors.
template <typename Run>
inline xla::ffi::Error by_type(xla::ffi::AnyBuffer q, Run run) {
  try {
    if (q.element_type() == xla::ffi::F32) {
      run(float{});
    } else if (q.element_type() == xla::ffi::F64) {
      run(double{});
    } else {
      return xla::ffi::Error::InvalidArgument("kernels for CPU take float32 and float64");
    }
  } catch (const std::exception& error) {
    return xla::ffi::Error::Internal(error.what());
  }
  return xla::ffi::Error::Success();
}

}  // namespace scanax

#endif  // SCANAX_KERNELS_NATIVE_H_
