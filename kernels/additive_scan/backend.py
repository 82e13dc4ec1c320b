"""What a backend of the additive scan provides, and how a forward and a backward join.

Every backend leaves the same residuals: the inputs, and the state at the start of every stride of
tokens. So the forward of one can run with the backward of another, and a new backend is a file
with two functions and a line in ``api.IMPLEMENTATIONS``:

  forward(q, k, v, f, state, run, *, scale, chunk, stride) -> o, final, starts
  backward(q, k, v, f, run, starts, final, do, dfinal, *, scale, chunk, stride)
      -> dq, dk, dv, df, dstate

  q, k, f [B, T, H, K], f or None; v, o, do [B, T, H, V]
  state, final, dfinal, dstate: (S [B, H, K, V], z [B, H, K]) in the accumulation dtype
  starts: the same with a leading X = ceil(T / stride), before token x * stride is added
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

CHECKPOINT = 64  # tokens between two states that are kept


class Backend(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def scan(
    q, k, v, k_factor, state, reset, *, scale, chunk_size, forward: Backend, backward: Backend
):
    """The scan with one backend's forward and one's backward; arguments as in ``reference.py``."""
    tokens = q.shape[1]
    run = None if reset is None else jnp.cumsum(reset.astype(jnp.int32), axis=1)
    stride, chunk = min(CHECKPOINT, _power_of_two(tokens)), None
    if chunk_size is not None:
        chunk = min(_power_of_two(chunk_size), _power_of_two(tokens))
        stride = max(stride, chunk)
    static = (forward, backward, float(scale), chunk, stride)
    return _scan(q, k, v, k_factor, state, run, static)


def _power_of_two(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << (number - 1).bit_length()


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _scan(q, k, v, f, state, run, static):
    return _scan_forward(q, k, v, f, state, run, static)[0]


def _scan_forward(q, k, v, f, state, run, static):
    forward, _, scale, chunk, stride = static
    options = {"scale": scale, "chunk": chunk, "stride": stride}
    o, final, starts = forward.forward(q, k, v, f, state, run, **options)
    return (o, final), (q, k, v, f, run, starts, final)


def _scan_backward(static, residuals, cotangents):
    _, backward, scale, chunk, stride = static
    options = {"scale": scale, "chunk": chunk, "stride": stride}
    return *backward.backward(*residuals, *cotangents, **options), None


_scan.defvjp(_scan_forward, _scan_backward)
