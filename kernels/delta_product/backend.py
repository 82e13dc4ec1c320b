"""What a backend of the DeltaProduct scan provides, and how a forward and a backward join.

Every backend leaves the same residuals: the inputs, and the state at the start of every stride of
tokens. So the forward of one can run with the backward of another, and a new backend is a file
with two functions and a line in ``api.IMPLEMENTATIONS``:

  forward(q, k, v, beta, g, state, run, *, scale, chunk, stride) -> o, final, starts
  backward(q, k, v, beta, g, run, starts, do, dfinal, *, scale, chunk, stride)
      -> dq, dk, dv, dbeta, dg, dstate

  q [B, T, H, K]; k [B, T, N, H, K]; v [B, T, N, H, V]; beta [B, T, N, H]; o, do [B, T, H, V]
  g [B, T, H] log decay, or None; its gradient too
  state, final, dfinal, dstate [B, H, K, V] in the accumulation dtype
  starts [X, B, H, K, V], X = ceil(T / stride): the state that token x * stride meets, before it is
      decayed or cleared
  run [B, T] int32, how often the state was cleared up to and with the token, or None; the state
      is cleared before every token whose number is not that of the token before it (0 at the start)
  chunk: tokens computed at once, or None for the backend's choice; it divides the stride
  stride: a power of two

Gradients have the dtype of what they belong to.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHECKPOINT = 128  # micro-steps between two states that are kept


class Backend(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def scan(q, k, v, beta, g, state, reset, *, scale, chunk_size, forward: Backend, backward: Backend):
    """The scan with one backend's forward and one's backward; arguments as in ``reference.py``."""
    tokens, steps = k.shape[1:3]
    run = None if reset is None else jnp.cumsum(reset.astype(jnp.int32), axis=1)
    stride = min(_power_of_two(tokens), _power_of_two(max(1, CHECKPOINT // steps) + 1) // 2)
    chunk = None
    if chunk_size is not None:
        chunk = min(_power_of_two(chunk_size), _power_of_two(tokens))
        stride = max(stride, chunk)
    static = (forward, backward, float(scale), chunk, stride)
    return _scan(q, k, v, beta, g, state, run, static)


def _power_of_two(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << (number - 1).bit_length()


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(q, k, v, beta, g, state, run, static):
    return _scan_forward(q, k, v, beta, g, state, run, static)[0]


def _scan_forward(q, k, v, beta, g, state, run, static):
    forward, _, scale, chunk, stride = static
    options = {"scale": scale, "chunk": chunk, "stride": stride}
    o, final, starts = forward.forward(q, k, v, beta, g, state, run, **options)
    return (o, final), (q, k, v, beta, g, run, starts)


def _scan_backward(static, residuals, cotangents):
    _, backward, scale, chunk, stride = static
    options = {"scale": scale, "chunk": chunk, "stride": stride}
    return *backward.backward(*residuals, *cotangents, **options), None


_scan.defvjp(_scan_forward, _scan_backward)
