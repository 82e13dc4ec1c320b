// The DeltaProduct scan on CPU, forward and backward: chunk.py in C++, one row and head at a time.
//
// Notation as in chunk.py: C tokens of a chunk, N steps of a token, L = C N micro-steps, R = C + L
// rows [queries; keys]. All of a chunk stays in cache between its products. Where chunk.py forms
// the inverse T = (I + beta M)^-1, this solves by substitution.

#include <cmath>

#include "native.h"

namespace ffi = xla::ffi;

namespace scanax {
namespace {

template <typename T, int kVectors>
inline void subtract(const T* m, ptrdiff_t m_step, int begin, int end, const T* x, int width,
                     T* row) {
  Vector<T> sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = load<T>(row + v * kLanes<T>);
  for (int s = begin; s < end; ++s) {
    const T factor = m[s * m_step];
    for (int v = 0; v < kVectors; ++v) {
      sum[v] -= factor * load<T>(x + s * width + v * kLanes<T>);
    }
  }
  for (int v = 0; v < kVectors; ++v) store<T>(row + v * kLanes<T>, sum[v]);
}

// row [width] -= the sum over s in [begin, end) of m[s * m_step] times row s of x.
template <typename T>
inline void subtract_rows(const T* m, ptrdiff_t m_step, int begin, int end, const T* x, int width,
                          T* row) {
  constexpr int n = kLanes<T>;
  int i = 0;
  for (; i + 4 * n <= width; i += 4 * n) {
    subtract<T, 4>(m, m_step, begin, end, x + i, width, row + i);
  }
  for (; i < width; i += n) subtract<T, 1>(m, m_step, begin, end, x + i, width, row + i);
}

struct Shape {
  int64_t batch, tokens, steps, heads;
  int key, value;
  int64_t chunk, stride;  // tokens
};

// The inputs of one row and head. Tokens follow each other at `heads` times the width, and so do
// micro-steps.
template <typename T>
struct Inputs {
  const T *q, *k, *v, *beta, *g;  // g may be null
  const int32_t* run;             // may be null
  T scale;
};

// A chunk of at most C tokens; all that does not depend on the state first.
template <typename T>
class Chunk {
 public:
  explicit Chunk(const Shape& shape)
      : K(padded<T>(shape.key)),
        V(padded<T>(shape.value)),
        P(padded<T>(shape.chunk * shape.steps)),
        y((shape.chunk + P) * K),
        value(P * V),
        beta(P),
        enter(shape.chunk),
        decay((shape.chunk + P) * P),
        w((shape.chunk + P) * P),
        read((shape.chunk + P) * V),
        error(P * V),
        u(P * V),
        left(P * V),
        keys(K * P),
        shape_(shape) {}

  const int K, V, P;  // padded widths of keys, values and micro-steps
  int64_t first;      // token
  int tokens, micro_steps, rows;

  Buffer<T> y;      // [R, K] queries, times the scale, and keys
  Buffer<T> value;  // [L, V]
  Buffer<T> beta;   // [L]
  Buffer<T> enter;  // [C] from the chunk's start to the token
  Buffer<T> decay;  // [R, P] from the micro-step in the column to the row; 0 for later ones
  Buffer<T> w;      // [R, P] scores: P and M of chunk.py
  Buffer<T> read;   // [R, V] what the entering state holds for the rows
  Buffer<T> error;  // [L, V] what a micro-step finds to correct: u = beta error
  Buffer<T> u;      // [L, V] pseudo-values

  T* key_rows() { return y + tokens * K; }
  // From a micro-step to the chunk's end; and from its start to its end.
  T leave(int s) const { return decay[(tokens - 1) * P + s]; }
  T across() const { return enter[tokens - 1]; }
  T enter_row(int r) const {
    return enter[r < tokens ? r : (r - tokens) / static_cast<int>(shape_.steps)];
  }

  void prepare(const Inputs<T>& in, int64_t from) {
    const int64_t heads = shape_.heads, N = shape_.steps;
    first = from;
    tokens = std::min(shape_.chunk, shape_.tokens - from);
    micro_steps = tokens * N;
    rows = tokens + micro_steps;
    const int64_t step = first * N;
    read_rows<T>(tokens, shape_.key, in.q + first * heads * shape_.key, heads * shape_.key,
                 in.scale, y, K);
    read_rows<T>(micro_steps, shape_.key, in.k + step * heads * shape_.key, heads * shape_.key, 1,
                 key_rows(), K);
    read_rows<T>(micro_steps, shape_.value, in.v + step * heads * shape_.value,
                 heads * shape_.value, 1, value, V);
    for (int s = 0; s < micro_steps; ++s) beta[s] = in.beta[(step + s) * heads];
    prepare_decay(in);
    transpose<T>(micro_steps, K, key_rows(), K, keys, P);
    product<T>(rows, P, shape_.key, plain<T>(y, K), keys, P, 0, w, P);
    for (int i = 0; i < rows * P; i += kLanes<T>) {
      store<T>(w + i, load<T>(w + i) * load<T>(decay + i));
    }
  }

  // Takes the state [K, V] through the chunk, to `next`, which may be the same.
  void pass_state(const T* state, T* next) {
    product<T>(rows, V, shape_.key, plain<T>(y, K), state, V, 0, read, V);
    for (int r = 0; r < rows; ++r) scale_row<T>(enter_row(r), read + r * V, read + r * V, V);
    const T* held = read + tokens * V;
    for (int i = 0; i < micro_steps * V; i += kLanes<T>) {
      store<T>(error + i, load<T>(value + i) - load<T>(held + i));
    }
    const T* m = w + tokens * P;
    for (int s = 0; s < micro_steps; ++s) {
      subtract_rows<T>(m + s * P, 1, 0, s, u, V, error + s * V);
      scale_row<T>(beta[s], error + s * V, u + s * V, V);
      scale_row<T>(leave(s), u + s * V, left + s * V, V);
    }
    if (next != state) std::copy(state, state + shape_.key * V, next);
    product<T>(shape_.key, V, micro_steps, transposed<T>(key_rows(), K), left, V, across(), next,
               V);
  }

  // o [C, V], in the place of what the queries read.
  T* outputs() {
    product<T>(tokens, V, micro_steps, plain<T>(w, P), u, V, 1, read, V);
    return read;
  }

 private:
  Buffer<T> left;  // [L, V] what is left of the pseudo-values at the chunk's end
  Buffer<T> keys;  // [K, P] keys as columns
  const Shape shape_;

  // Products of the tokens' decays, which are at most 1; a cleared state is a factor of 0.
  void prepare_decay(const Inputs<T>& in) {
    const int64_t heads = shape_.heads;
    const int N = shape_.steps;
    std::fill(decay + 0, decay + rows * P, T(0));
    T entered = 1;
    for (int t = 0; t < tokens; ++t) {
      const int64_t token = first + t;
      T factor = in.g == nullptr ? T(1) : std::exp(in.g[token * heads]);
      if (in.run != nullptr && in.run[token] != (token == 0 ? 0 : in.run[token - 1])) factor = 0;
      enter[t] = entered *= factor;
      T* row = decay + t * P;
      for (int s = 0; s < t * N; ++s) row[s] = factor * row[s - P];
      std::fill(row + t * N, row + (t + 1) * N, T(1));
      for (int j = t * N; j < (t + 1) * N; ++j) {
        std::copy(row, row + j, decay + (tokens + j) * P);
      }
    }
  }
};

// The gradients of one row and head, laid out as the inputs.
template <typename T>
struct Gradients {
  T *q, *k, *v, *beta, *g;  // g may be null
};

// The backward of a chunk, as in chunk.py; its buffers are used from chunk to chunk.
template <typename T>
class Backward {
 public:
  explicit Backward(const Shape& shape)
      : K(padded<T>(shape.key)),
        V(padded<T>(shape.value)),
        P(padded<T>(shape.chunk * shape.steps)),
        x((shape.chunk + P) * V),
        e(P * V),
        dv(P * V),
        left(P * V),
        dw((shape.chunk + P) * P),
        dy((shape.chunk + P) * K),
        u_columns(V * P),
        state_columns(V * K),
        dstate_columns(V * K),
        shape_(shape) {}

  // dout: do at this row and head. dstate [K, V]: the cotangent of the state that leaves the
  // chunk, which becomes that of the state that enters it.
  void operator()(Chunk<T>& c, const Inputs<T>& in, const T* dout, const T* entering,
                  const T* leaving, T* dstate, const Gradients<T>& out) {
    const int64_t heads = shape_.heads, step = c.first * shape_.steps;
    const int key = shape_.key, value = shape_.value, L = c.micro_steps;
    const T dlater = dot<T>(dstate, leaving, key * V);

    // e = T^T (P^T do + leave k dH), dv = beta e
    read_rows<T>(c.tokens, value, dout + c.first * heads * value, heads * value, 1, x, V);
    product<T>(L, V, key, plain<T>(c.key_rows(), K), dstate, V, 0, e, V);
    for (int s = 0; s < L; ++s) scale_row<T>(c.leave(s), e + s * V, e + s * V, V);
    product<T>(L, V, c.tokens, transposed<T>(c.w, P), x, V, 1, e, V);
    const T* m = c.w + c.tokens * P;
    for (int s = L - 1; s >= 0; --s) {
      subtract_rows<T>(m + s, P, s + 1, L, dv, V, e + s * V);
      scale_row<T>(c.beta[s], e + s * V, dv + s * V, V);
      out.beta[(step + s) * heads] = dot<T>(e + s * V, c.error + s * V, V);
    }

    // X = [do; -dv], dW = decay X u^T
    for (int s = 0; s < L; ++s) scale_row<T>(-1, dv + s * V, x + (c.tokens + s) * V, V);
    transpose<T>(L, V, c.u, V, u_columns, P);
    product<T>(c.rows, P, V, plain<T>(x, V), u_columns, P, 0, dw, P);
    for (int i = 0; i < c.rows * P; i += kLanes<T>) {
      store<T>(dw + i, load<T>(dw + i) * load<T>(c.decay + i));
    }

    // dY = enter X H^T + dW k, and for the keys dW^T Y + leave u dH^T
    for (int r = 0; r < c.rows; ++r) scale_row<T>(c.enter_row(r), x + r * V, x + r * V, V);
    transpose<T>(key, V, entering, V, state_columns, K);
    product<T>(c.rows, K, value, plain<T>(x, V), state_columns, K, 0, dy, K);
    product<T>(c.rows, K, L, plain<T>(dw, P), c.key_rows(), K, 1, dy, K);
    T* dkeys = dy + c.tokens * K;
    product<T>(L, K, c.rows, transposed<T>(dw, P), c.y, K, 1, dkeys, K);
    transpose<T>(key, V, dstate, V, dstate_columns, K);
    for (int s = 0; s < L; ++s) scale_row<T>(c.leave(s), c.u + s * V, left + s * V, V);
    product<T>(L, K, value, plain<T>(left, V), dstate_columns, K, 1, dkeys, K);

    // dH = across dH + (enter Y)^T X
    product<T>(key, V, c.rows, transposed<T>(c.y, K), x, V, c.across(), dstate, V);

    if (out.g != nullptr) decay_gradient(c, dlater, out);
    write_rows<T>(c.tokens, key, dy, K, in.scale, out.q + c.first * heads * key, heads * key);
    write_rows<T>(L, key, dkeys, K, 1, out.k + step * heads * key, heads * key);
    write_rows<T>(L, value, dv, V, 1, out.v + step * heads * value, heads * value);
  }

 private:
  const int K, V, P;
  Buffer<T> x, e, dv, left, dw, dy;
  Buffer<T> u_columns, state_columns, dstate_columns;  // transposes, as right factors
  const Shape shape_;

  // From homogeneity: see `_decay_gradient` of chunk.py.
  void decay_gradient(const Chunk<T>& c, T dlater, const Gradients<T>& out) const {
    const int N = shape_.steps;
    T sum = dlater;
    for (int t = c.tokens - 1; t >= 0; --t) {
      sum += dot<T>(c.y + t * K, dy + t * K, K);
      for (int s = t * N; s < (t + 1) * N; ++s) sum -= dot<T>(c.value + s * V, dv + s * V, V);
      out.g[(c.first + t) * shape_.heads] = sum;
    }
  }
};

template <typename T>
Inputs<T> inputs_of_head(int64_t b, int64_t h, const Shape& shape, double scale, ffi::AnyBuffer q,
                         ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer beta,
                         ffi::AnyBuffer g, ffi::AnyBuffer run) {
  return {of_head<const T>(q, shape.batch, b, h, shape.key),
          of_head<const T>(k, shape.batch, b, h, shape.key),
          of_head<const T>(v, shape.batch, b, h, shape.value),
          of_head<const T>(beta, shape.batch, b, h, 1),
          of_head<const T>(g, shape.batch, b, h, 1),
          of_head<const int32_t>(run, shape.batch, b, 0, 1),
          static_cast<T>(scale)};
}

Shape shape_of(ffi::AnyBuffer k, ffi::AnyBuffer v, int64_t chunk, int64_t stride) {
  const auto size = k.dimensions();
  return {size[0], size[1], size[2], size[3], static_cast<int>(size[4]),
          static_cast<int>(v.dimensions()[4]), chunk, stride};
}

template <typename T>
void forward(ffi::ThreadPool& pool, const Shape& shape, double scale, ffi::AnyBuffer q,
             ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer beta, ffi::AnyBuffer g,
             ffi::AnyBuffer state, ffi::AnyBuffer run, ffi::AnyBuffer o, ffi::AnyBuffer final,
             ffi::AnyBuffer starts) {
  const int64_t items = shape.batch * shape.heads, size = shape.key * shape.value;
  among_threads(pool, items, [=](const auto& next) {
    const int V = padded<T>(shape.value);
    Chunk<T> chunk(shape);
    Buffer<T> now(shape.key * V);
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t b = item / shape.heads, h = item % shape.heads;
      const auto in = inputs_of_head<T>(b, h, shape, scale, q, k, v, beta, g, run);
      T* out = of_head<T>(o, shape.batch, b, h, shape.value);
      auto write_state = [&](T* to) {
        write_rows<T>(shape.key, shape.value, now, V, 1, to, shape.value);
      };
      read_rows<T>(shape.key, shape.value, part<T>(state, item, size), shape.value, 1, now, V);
      for (int64_t t = 0; t < shape.tokens; t += shape.chunk) {
        if (starts.element_count() != 0 && t % shape.stride == 0) {
          write_state(part<T>(starts, t / shape.stride * items + item, size));
        }
        chunk.prepare(in, t);
        chunk.pass_state(now, now);
        const int64_t token = shape.heads * shape.value;
        write_rows<T>(chunk.tokens, shape.value, chunk.outputs(), V, 1, out + t * token, token);
      }
      write_state(part<T>(final, item, size));
    }
  });
}

template <typename T>
void backward(ffi::ThreadPool& pool, const Shape& shape, double scale, ffi::AnyBuffer q,
              ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer beta, ffi::AnyBuffer g,
              ffi::AnyBuffer run, ffi::AnyBuffer starts, ffi::AnyBuffer dout,
              ffi::AnyBuffer dfinal, ffi::AnyBuffer dq, ffi::AnyBuffer dk, ffi::AnyBuffer dv,
              ffi::AnyBuffer dbeta, ffi::AnyBuffer dg, ffi::AnyBuffer dstate) {
  const int64_t items = shape.batch * shape.heads, size = shape.key * shape.value;
  const int64_t strides = (shape.tokens + shape.stride - 1) / shape.stride;
  const int64_t most = std::min(shape.stride, shape.tokens);
  among_threads(pool, items, [=](const auto& next) {
    const int V = padded<T>(shape.value);
    Backward<T> reverse(shape);
    std::vector<Chunk<T>> chunks;  // of a stride, with the states between them
    std::vector<Buffer<T>> states;
    for (int64_t t = 0; t < most; t += shape.chunk) {
      chunks.emplace_back(shape);
      states.emplace_back(shape.key * V);
    }
    states.emplace_back(shape.key * V);
    Buffer<T> dnow(shape.key * V);
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t b = item / shape.heads, h = item % shape.heads;
      const auto in = inputs_of_head<T>(b, h, shape, scale, q, k, v, beta, g, run);
      const Gradients<T> out = {of_head<T>(dq, shape.batch, b, h, shape.key),
                                of_head<T>(dk, shape.batch, b, h, shape.key),
                                of_head<T>(dv, shape.batch, b, h, shape.value),
                                of_head<T>(dbeta, shape.batch, b, h, 1),
                                of_head<T>(dg, shape.batch, b, h, 1)};
      const T* dout_head = of_head<const T>(dout, shape.batch, b, h, shape.value);
      read_rows<T>(shape.key, shape.value, part<T>(dfinal, item, size), shape.value, 1, dnow, V);
      for (int64_t x = strides - 1; x >= 0; --x) {
        read_rows<T>(shape.key, shape.value, part<T>(starts, x * items + item, size),
                     shape.value, 1, states[0], V);
        int count = 0;
        const int64_t end = std::min((x + 1) * shape.stride, shape.tokens);
        for (int64_t t = x * shape.stride; t < end; t += shape.chunk, ++count) {
          chunks[count].prepare(in, t);
          chunks[count].pass_state(states[count], states[count + 1]);
        }
        while (--count >= 0) {
          reverse(chunks[count], in, dout_head, states[count], states[count + 1], dnow, out);
        }
      }
      write_rows<T>(shape.key, shape.value, dnow, V, 1, part<T>(dstate, item, size), shape.value);
    }
  });
}

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// Of g and run, dg and starts, an array without entries is None.
ffi::Error run_forward(ffi::ThreadPool pool, double scale, int64_t chunk, int64_t stride, In q,
                       In k, In v, In beta, In g, In state, In run, Out o, Out final, Out starts) {
  return by_type(q, [&](auto zero) {
    forward<decltype(zero)>(pool, shape_of(k, v, chunk, stride), scale, q, k, v, beta, g, state,
                            run, *o, *final, *starts);
  });
}

ffi::Error run_backward(ffi::ThreadPool pool, double scale, int64_t chunk, int64_t stride, In q,
                        In k, In v, In beta, In g, In run, In starts, In dout, In dfinal, Out dq,
                        Out dk, Out dv, Out dbeta, Out dg, Out dstate) {
  return by_type(q, [&](auto zero) {
    backward<decltype(zero)>(pool, shape_of(k, v, chunk, stride), scale, q, k, v, beta, g, run,
                             starts, dout, dfinal, *dq, *dk, *dv, *dbeta, *dg, *dstate);
  });
}

}  // namespace
}  // namespace scanax

XLA_FFI_DEFINE_HANDLER_SYMBOL(delta_product_forward, scanax::run_forward, (scanax::scan_with<7, 3>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(delta_product_backward, scanax::run_backward, (scanax::scan_with<9, 6>()));
