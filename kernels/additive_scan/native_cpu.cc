// The additive scan on CPU, forward and backward: quotients.py in C++, one row and head at a time.
//
// Notation as there: tokens i, j of a chunk; r the reference of a chunk, e_j = exp(k_j - r),
// E_i = exp(z_i - r). The state is kept as it is before it is divided: U = E S, relative to the
// running reference, which makes it a sum, U_e = exp(r_b - r) U_b + sum_j (e_j f_j) v_j^T, with
//
//   o_i = (q_i / E_i) U_i,   U_i = exp(r_b - r) U_b + sum_{j <= i} (e_j f_j) v_j^T
//
// Backward, with Q_i = q_i / E_i, w_j = e_j f_j and the cotangents dU, dE of the sums:
//
//   dQ_i = U_i do_i,   dE_i = -Q_i dQ_i / E_i,   dw_j = dU_e v_j + sum_{i >= j} (do_i . v_j) Q_i
//   dk_j = e_j (f_j dw_j + dE_e + sum_{i >= j} dE_i)
//
// A chunk ends where the state is cleared. If keys rise so much within a chunk that the first of
// them are lost, the chunk is taken in parts; of one token, nothing is lost. A channel without a
// key so far does not decay at its first one: its U is then S exp(k_first - r), and E is 0.

#include <cmath>
#include <limits>

#include "native.h"

namespace ffi = xla::ffi;

namespace scanax {
namespace {

constexpr double kSmallest = 1e-20;  // of E; what is multiplied by it is far from float32's 1e-38

struct Shape {
  int64_t batch, tokens, heads;
  int key, value;
  int64_t chunk, stride;  // tokens
};

// The inputs of one row and head; tokens follow each other at `heads` times the width.
template <typename T>
struct Inputs {
  const T *q, *k, *v, *f;  // f may be null
  const int32_t* run;      // may be null
  T scale;

  bool cleared(int64_t t) const {
    return run != nullptr && run[t] != (t == 0 ? 0 : run[t - 1]);
  }
};

// U [K, V], and E [K] relative to r [K]; E = 0 and r = -inf for channels that have no key yet.
template <typename T>
struct State {
  explicit State(const Shape& shape)
      : key(shape.key),
        value(shape.value),
        V(padded<T>(value)),
        u(key * V),
        e(padded<T>(key)),
        r(padded<T>(key)) {}

  void clear() {
    std::fill(u + 0, u + key * V, T(0));
    std::fill(e + 0, e + key, T(0));
    std::fill(r + 0, r + key, -std::numeric_limits<T>::infinity());
  }

  // From and to S [K, V] and z [K].
  void read(const T* s, const T* z) {
    read_rows<T>(key, value, s, value, 1, u, V);
    for (int c = 0; c < key; ++c) {
      e[c] = z[c] == -std::numeric_limits<T>::infinity() ? 0 : 1;
      r[c] = z[c];
    }
  }
  void write(T* s, T* z) const {
    for (int c = 0; c < key; ++c) {
      write_rows<T>(1, value, u + c * V, V, e[c] == 0 ? 1 : 1 / e[c], s + c * value, value);
      z[c] = r[c] + std::log(e[c]);
    }
  }

  const int key, value, V;
  Buffer<T> u, e, r;
};

// A chunk of at most C tokens.
template <typename T>
class Chunk {
 public:
  explicit Chunk(const Shape& shape)
      : K(padded<T>(shape.key)),
        V(padded<T>(shape.value)),
        P(padded<T>(shape.chunk)),
        q(P * K),
        value(P * V),
        e(P * K),
        f(P * K),
        w(P * K),
        inverse(P * K),
        weighed(P * K),
        scores(P * P),
        keep(K),
        opens(K),
        sum(K),
        reference(K),
        k(P * K),
        columns(K * P),
        o(P * V),
        shape_(shape) {}

  const int K, V, P;  // padded widths of keys, values and tokens
  int64_t first;      // token
  int tokens;
  bool cleared;  // the state, before the first token

  Buffer<T> q;              // [C, K] times the scale
  Buffer<T> value;          // [C, V]
  Buffer<T> e, f, w;        // [C, K]: e_j, f_j and their product
  Buffer<T> inverse;        // [C, K]: 1 / E_i
  Buffer<T> weighed;        // [C, K]: Q_i
  Buffer<T> scores;         // [C, P]: Q_i . w_j for j <= i, else 0
  Buffer<T> keep;           // [K]: what U_b is multiplied by
  Buffer<T> opens;          // [K]: the token with the channel's first key; -1 if E_b > 0
  Buffer<T> sum, reference;  // [K]: E_e and r

  // Takes the tokens from `from` on, as many as a chunk may have. `state` is what enters it.
  void prepare(const Inputs<T>& in, int64_t from, State<T>& state) {
    first = from;
    tokens = std::min(shape_.chunk, shape_.tokens - from);
    tokens = std::min<int64_t>(tokens, shape_.stride - from % shape_.stride);
    cleared = in.cleared(first);
    if (cleared) state.clear();
    for (int t = tokens - 1; t > 0; --t) {
      if (in.cleared(first + t)) tokens = t;
    }
    const int64_t row = shape_.heads * shape_.key, start = first * row;
    read_rows<T>(tokens, shape_.key, in.q + start, row, in.scale, q, K);
    read_rows<T>(tokens, shape_.key, in.k + start, row, 1, k, K);
    if (in.f != nullptr) {
      read_rows<T>(tokens, shape_.key, in.f + start, row, 1, f, K);
    } else {
      std::fill(f + 0, f + tokens * K, T(1));
    }
    while (!weigh(state) && tokens > 1) tokens = (tokens + 1) / 2;
    const int64_t values = shape_.heads * shape_.value;
    read_rows<T>(tokens, shape_.value, in.v + first * values, values, 1, value, V);
    transpose<T>(tokens, K, w, K, columns, P);
    product<T>(tokens, P, shape_.key, plain<T>(weighed, K), columns, P, 0, scores, P);
    clear_later(scores);
  }

  // Relates the state to this chunk's reference; then outputs; then takes it to the chunk's end.
  void enter(State<T>& state) const {
    for (int c = 0; c < shape_.key; ++c) scale_row<T>(keep[c], state.u + c * V, state.u + c * V, V);
  }
  const T* outputs(const State<T>& state) {
    product<T>(tokens, V, shape_.key, plain<T>(weighed, K), state.u, V, 0, o, V);
    product<T>(tokens, V, tokens, plain<T>(scores, P), value, V, 1, o, V);
    return o;
  }
  void leave(const State<T>& state, State<T>& next) const {
    if (&next != &state) std::copy(state.u + 0, state.u + shape_.key * V, next.u + 0);
    product<T>(shape_.key, V, tokens, transposed<T>(w, K), value, V, 1, next.u, V);
    std::copy(sum + 0, sum + shape_.key, next.e + 0);
    std::copy(reference + 0, reference + shape_.key, next.r + 0);
  }

  // Pairs [C, P] of a token and later ones are 0.
  void clear_later(T* pairs) const {
    for (int i = 0; i < tokens; ++i) std::fill(pairs + i * P + i + 1, pairs + (i + 1) * P, T(0));
  }

 private:
  Buffer<T> k, columns, o;
  const Shape shape_;

  // Everything by channel, for `tokens` tokens; false if some keys are lost.
  bool weigh(const State<T>& state) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    bool sound = true;
    for (int c = 0; c < K; c += kLanes<T>) {
      const Vector<T> none = Vector<T>{} + kNone, zero{}, one = zero + T(1);
      const Vector<T> before = load<T>(state.e + c), before_r = load<T>(state.r + c);
      const auto has = before > 0;
      Vector<T> r = has ? before_r : none, first_key = none, open = has ? -one : one * T(tokens);
      for (int i = tokens - 1; i >= 0; --i) {
        const Vector<T> key = load<T>(k + i * K + c);
        const auto present = key != none;
        r = key > r ? key : r;
        first_key = present ? key : first_key;
        open = ~has & present ? one * T(i) : open;
      }
      store<T>(reference + c, r);
      store<T>(opens + c, open);
      r = r == none ? zero : r;
      const Vector<T> kept = exp_nonpositive<T>((has ? before_r : first_key) - r);
      const Vector<T> keeps = (has | (first_key != none)) ? kept : one;
      store<T>(keep + c, keeps);
      Vector<T> total = before * keeps;
      for (int i = 0; i < tokens; ++i) {
        const int at = i * K + c;
        const Vector<T> key = load<T>(k + at), weight = exp_nonpositive<T>(key - r);
        total += weight;
        const Vector<T> inverted = one / (total > 0 ? total : keeps);
        store<T>(e + at, weight);
        store<T>(w + at, weight * load<T>(f + at));
        store<T>(inverse + at, inverted);
        store<T>(weighed + at, inverted * load<T>(q + at));
        // A sum of nothing is 0; that of a channel which has had keys is at least the smallest.
        const auto lost = ~((total >= T(kSmallest)) | ((total == 0) & (open > zero + T(i))));
        for (int lane = 0; lane < kLanes<T>; ++lane) sound &= !lost[lane];
      }
      store<T>(sum + c, total);
    }
    return sound;
  }
};

// The gradients of one row and head, laid out as the inputs.
template <typename T>
struct Gradients {
  T *q, *k, *v, *f;  // f may be null
};

// The backward of a chunk; its buffers are used from chunk to chunk.
template <typename T>
class Backward {
 public:
  explicit Backward(const Shape& shape)
      : K(padded<T>(shape.key)),
        V(padded<T>(shape.value)),
        P(padded<T>(shape.chunk)),
        dout(P * V),
        pairs(P * P),
        dq(P * K),
        dk(P * K),
        dv(P * V),
        dw(P * K),
        value_columns(V * P),
        state_columns(V * K),
        dstate_columns(V * K),
        shape_(shape) {}

  // dout_head: do at this row and head. `state`: as it entered, after `enter`. du [K, V] and
  // de [K]: cotangents of U and E at the chunk's end, which become those of what entered.
  void operator()(const Chunk<T>& c, const T* dout_head, T scale, const State<T>& state, T* du,
                  T* de, const Gradients<T>& out) {
    const int key = shape_.key, value = shape_.value, tokens = c.tokens;
    const int64_t keys = shape_.heads * key, values = shape_.heads * value;
    read_rows<T>(tokens, value, dout_head + c.first * values, values, 1, dout, V);

    transpose<T>(tokens, V, c.value, V, value_columns, P);
    product<T>(tokens, P, value, plain<T>(dout, V), value_columns, P, 0, pairs, P);
    c.clear_later(pairs);

    transpose<T>(key, V, state.u, V, state_columns, K);
    product<T>(tokens, K, value, plain<T>(dout, V), state_columns, K, 0, dq, K);
    product<T>(tokens, K, tokens, plain<T>(pairs, P), c.w, K, 1, dq, K);

    product<T>(tokens, V, key, plain<T>(c.w, K), du, V, 0, dv, V);
    product<T>(tokens, V, tokens, transposed<T>(c.scores, P), dout, V, 1, dv, V);

    transpose<T>(key, V, du, V, dstate_columns, K);
    product<T>(tokens, K, value, plain<T>(c.value, V), dstate_columns, K, 0, dw, K);
    product<T>(tokens, K, tokens, transposed<T>(pairs, P), c.weighed, K, 1, dw, K);

    product<T>(key, V, tokens, transposed<T>(c.weighed, K), dout, V, 1, du, V);
    through_weights(c, state, du, de);
    if (c.cleared) {
      std::fill(du, du + key * V, T(0));
      std::fill(de, de + key, T(0));
    } else {
      for (int i = 0; i < key; ++i) scale_row<T>(c.keep[i], du + i * V, du + i * V, V);
    }
    write_rows<T>(tokens, key, dq, K, scale, out.q + c.first * keys, keys);
    write_rows<T>(tokens, key, dk, K, 1, out.k + c.first * keys, keys);
    write_rows<T>(tokens, value, dv, V, 1, out.v + c.first * values, values);
    if (out.f != nullptr) write_rows<T>(tokens, key, dw, K, 1, out.f + c.first * keys, keys);
  }

 private:
  const int K, V, P;
  Buffer<T> dout, pairs, dq, dk, dv, dw;
  Buffer<T> value_columns, state_columns, dstate_columns;  // transposes, as right factors
  const Shape shape_;

  // From dQ, dw and the sums to dq, dk, df (in the place of dQ and dw) and dE before.
  void through_weights(const Chunk<T>& c, const State<T>& state, const T* du, T* de) {
    for (int at = 0; at < K; at += kLanes<T>) {
      const Vector<T> open = load<T>(c.opens + at), zero{};
      Vector<T> later = load<T>(de + at), waited = zero;
      for (int i = c.tokens - 1; i >= 0; --i) {
        const int x = i * K + at;
        const Vector<T> dq_i = load<T>(c.inverse + x) * load<T>(dq + x);
        const Vector<T> through = load<T>(c.q + x) * dq_i;
        const auto counts = open <= zero + T(i);
        later -= counts ? load<T>(c.inverse + x) * through : zero;
        waited += counts ? zero : through;
        const Vector<T> by_weight = load<T>(dw + x);
        store<T>(dq + x, dq_i);
        store<T>(dk + x, load<T>(c.e + x) * (load<T>(c.f + x) * by_weight + later));
        store<T>(dw + x, load<T>(c.e + x) * by_weight);
      }
      store<T>(de + at, open < zero ? load<T>(c.keep + at) * later : zero);
      for (int lane = 0; lane < kLanes<T> && at + lane < shape_.key; ++lane) {
        if (!(open[lane] >= 0 && open[lane] < c.tokens)) continue;
        const int channel = at + lane;
        const T held = dot<T>(du + channel * V, state.u + channel * V, V);
        dk[static_cast<int>(open[lane]) * K + channel] += held - waited[lane];
      }
    }
  }
};

template <typename T>
Inputs<T> inputs_of_head(int64_t b, int64_t h, const Shape& shape, double scale, ffi::AnyBuffer q,
                         ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer f,
                         ffi::AnyBuffer run) {
  return {of_head<const T>(q, shape.batch, b, h, shape.key),
          of_head<const T>(k, shape.batch, b, h, shape.key),
          of_head<const T>(v, shape.batch, b, h, shape.value),
          of_head<const T>(f, shape.batch, b, h, shape.key),
          of_head<const int32_t>(run, shape.batch, b, 0, 1),
          static_cast<T>(scale)};
}

Shape shape_of(ffi::AnyBuffer k, ffi::AnyBuffer v, int64_t chunk, int64_t stride) {
  const auto size = k.dimensions();
  return {size[0], size[1], size[2], static_cast<int>(size[3]),
          static_cast<int>(v.dimensions()[3]), chunk, stride};
}

template <typename T>
void forward(ffi::ThreadPool& pool, const Shape& shape, double scale, ffi::AnyBuffer q,
             ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer f, ffi::AnyBuffer s,
             ffi::AnyBuffer z, ffi::AnyBuffer run, ffi::AnyBuffer o, ffi::AnyBuffer final_s,
             ffi::AnyBuffer final_z, ffi::AnyBuffer starts_s, ffi::AnyBuffer starts_z) {
  const int64_t items = shape.batch * shape.heads;
  among_threads(pool, items, [=](const auto& next) {
    Chunk<T> chunk(shape);
    State<T> state(shape);
    const int64_t size = shape.key * shape.value, row = shape.heads * shape.value;
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t b = item / shape.heads, h = item % shape.heads;
      const auto in = inputs_of_head<T>(b, h, shape, scale, q, k, v, f, run);
      T* out = of_head<T>(o, shape.batch, b, h, shape.value);
      state.read(part<T>(s, item, size), part<T>(z, item, shape.key));
      for (int64_t t = 0; t < shape.tokens; t += chunk.tokens) {
        if (starts_s.element_count() != 0 && t % shape.stride == 0) {
          const int64_t x = t / shape.stride;
          state.write(part<T>(starts_s, x * items + item, size),
                      part<T>(starts_z, x * items + item, shape.key));
        }
        chunk.prepare(in, t, state);
        chunk.enter(state);
        write_rows<T>(chunk.tokens, shape.value, chunk.outputs(state), chunk.V, 1, out + t * row,
                      row);
        chunk.leave(state, state);
      }
      state.write(part<T>(final_s, item, size),
                  part<T>(final_z, item, shape.key));
    }
  });
}

template <typename T>
void backward(ffi::ThreadPool& pool, const Shape& shape, double scale, ffi::AnyBuffer q,
              ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer f, ffi::AnyBuffer run,
              ffi::AnyBuffer starts_s, ffi::AnyBuffer starts_z, ffi::AnyBuffer final_s,
              ffi::AnyBuffer dout, ffi::AnyBuffer dfinal_s, ffi::AnyBuffer dfinal_z,
              ffi::AnyBuffer dq, ffi::AnyBuffer dk, ffi::AnyBuffer dv, ffi::AnyBuffer df,
              ffi::AnyBuffer ds, ffi::AnyBuffer dz) {
  const int64_t strides = (shape.tokens + shape.stride - 1) / shape.stride;
  const int64_t items = shape.batch * shape.heads;
  among_threads(pool, items, [=](const auto& next) {
    const int64_t size = shape.key * shape.value;
    const int V = padded<T>(shape.value);
    Backward<T> reverse(shape);
    std::vector<Chunk<T>> chunks;  // of a stride, with the states that enter them
    std::vector<State<T>> states;
    Buffer<T> du(shape.key * V), de(padded<T>(shape.key));
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t b = item / shape.heads, h = item % shape.heads;
      const auto in = inputs_of_head<T>(b, h, shape, scale, q, k, v, f, run);
      const Gradients<T> out = {of_head<T>(dq, shape.batch, b, h, shape.key),
                                of_head<T>(dk, shape.batch, b, h, shape.key),
                                of_head<T>(dv, shape.batch, b, h, shape.value),
                                of_head<T>(df, shape.batch, b, h, shape.key)};
      const T* dout_head = of_head<const T>(dout, shape.batch, b, h, shape.value);
      // What reaches S and z of a stride's end, as if U = S and E = 1.
      const T* s_end = part<T>(final_s, item, size);
      const T* ds_end = part<T>(dfinal_s, item, size);
      const T* dz_end = part<T>(dfinal_z, item, shape.key);
      read_rows<T>(shape.key, shape.value, ds_end, shape.value, 1, du, V);
      for (int c = 0; c < shape.key; ++c) {
        de[c] = dz_end[c];
        for (int i = 0; i < shape.value; ++i) {
          de[c] -= ds_end[c * shape.value + i] * s_end[c * shape.value + i];
        }
      }
      for (int64_t x = strides - 1; x >= 0; --x) {
        const int64_t end = std::min((x + 1) * shape.stride, shape.tokens);
        size_t count = 0;
        for (int64_t t = x * shape.stride; t < end; t += chunks[count++].tokens) {
          if (count == chunks.size()) chunks.emplace_back(shape);
          while (states.size() < count + 2) states.emplace_back(shape);
          if (count == 0) {
            states[0].read(part<T>(starts_s, x * items + item, size),
                           part<T>(starts_z, x * items + item, shape.key));
          }
          chunks[count].prepare(in, t, states[count]);
          chunks[count].enter(states[count]);
          chunks[count].leave(states[count], states[count + 1]);
        }
        for (int c = 0; c < shape.key; ++c) {
          const T sum = states[count].e[c];
          if (sum > 0) scale_row<T>(1 / sum, du + c * V, du + c * V, V);
          de[c] = sum > 0 ? de[c] / sum : 0;
        }
        while (count-- > 0) {
          reverse(chunks[count], dout_head, in.scale, states[count], du, de, out);
        }
      }
      T* ds_out = part<T>(ds, item, size);
      T* dz_out = part<T>(dz, item, shape.key);
      State<T>& initial = states[0];
      initial.read(part<T>(starts_s, item, size),
                   part<T>(starts_z, item, shape.key));
      write_rows<T>(shape.key, shape.value, du, V, 1, ds_out, shape.value);
      for (int c = 0; c < shape.key; ++c) {
        dz_out[c] = initial.e[c] == 0 ? 0 : dot<T>(du + c * V, initial.u + c * V, V) + de[c];
      }
    }
  });
}

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// Of f and run, df and the starts, an array without entries is None.
ffi::Error run_forward(ffi::ThreadPool pool, double scale, int64_t chunk, int64_t stride, In q,
                       In k, In v, In f, In s, In z, In run, Out o, Out final_s, Out final_z,
                       Out starts_s, Out starts_z) {
  return by_type(q, [&](auto zero) {
    forward<decltype(zero)>(pool, shape_of(k, v, chunk, stride), scale, q, k, v, f, s, z, run, *o,
                            *final_s, *final_z, *starts_s, *starts_z);
  });
}

ffi::Error run_backward(ffi::ThreadPool pool, double scale, int64_t chunk, int64_t stride, In q,
                        In k, In v, In f, In run, In starts_s, In starts_z, In final_s, In dout,
                        In dfinal_s, In dfinal_z, Out dq, Out dk, Out dv, Out df, Out ds, Out dz) {
  return by_type(q, [&](auto zero) {
    backward<decltype(zero)>(pool, shape_of(k, v, chunk, stride), scale, q, k, v, f, run, starts_s,
                             starts_z, final_s, dout, dfinal_s, dfinal_z, *dq, *dk, *dv, *df, *ds,
                             *dz);
  });
}

}  // namespace
}  // namespace scanax

XLA_FFI_DEFINE_HANDLER_SYMBOL(additive_scan_forward, scanax::run_forward, (scanax::scan_with<7, 5>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(additive_scan_backward, scanax::run_backward, (scanax::scan_with<11, 6>()));
