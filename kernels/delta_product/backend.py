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

from ..per_device import per_device
from ..rows import power_of_two, resets_so_far

CHECKPOINT = 128  # micro-steps between two states that are kept, at most
SHORTEST = 16  # tokens between them, at least: shorter rows are padded


INPUTS = ("BTHK", "BTNHK", "BTNHV", "BTNH", "BTH", "BHKV", "BT")
RESIDUALS = ("BTHK", "BTNHK", "BTNHV", "BTNH", "BTH", "BT", "XBHKV", "BTHV", "BHKV")


class Backend(NamedTuple):
    """The two functions, what they support, and whether the compiler can divide them.

    ``supports`` takes the arguments of ``forward`` and returns None or the reason why not.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *args, **options: None
    divisible: bool = True


def scan(q, k, v, beta, g, state, reset, *, scale, chunk_size, forward: Backend, backward: Backend):
    """The scan with one backend's forward and one's backward; arguments as in ``reference.py``."""
    sizes = _sizes(k, chunk_size)
    static = (forward, backward, float(scale), *sizes)
    return _scan(q, k, v, beta, g, state, resets_so_far(reset), static)


def supports(
    q, k, v, beta, g, state, reset, *, scale, chunk_size, forward: Backend, backward: Backend
) -> str | None:
    """Why :func:`scan` cannot run on these arguments, or None."""
    chunk, stride = _sizes(k, chunk_size)
    arguments = (q, k, v, beta, g, state, resets_so_far(reset))
    reasons = (
        backend.supports(*arguments, scale=scale, chunk=chunk, stride=stride)
        for backend in (forward, backward)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _sizes(k, chunk_size: int | None) -> tuple[int | None, int]:
    """Chunk and stride."""
    tokens, steps = k.shape[1:3]
    longest = power_of_two(max(1, CHECKPOINT // steps) + 1) // 2
    stride = min(max(power_of_two(tokens), SHORTEST), longest)
    if chunk_size is None:
        return None, stride
    chunk = min(power_of_two(chunk_size), power_of_two(tokens))
    return chunk, max(stride, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(q, k, v, beta, g, state, run, static):
    return _scan_forward(q, k, v, beta, g, state, run, static)[0]


def _scan_forward(q, k, v, beta, g, state, run, static):
    backend, _, scale, chunk, stride = static
    function = functools.partial(backend.forward, scale=scale, chunk=chunk, stride=stride)
    if not backend.divisible:
        function = per_device(function, INPUTS, ("BTHV", "BHKV", "XBHKV"))
    o, final, starts = function(q, k, v, beta, g, state, run)
    return (o, final), (q, k, v, beta, g, run, starts)


def _scan_backward(static, residuals, cotangents):
    _, backend, scale, chunk, stride = static
    function = functools.partial(backend.backward, scale=scale, chunk=chunk, stride=stride)
    if not backend.divisible:
        function = per_device(function, RESIDUALS, INPUTS[:6])
    return *function(*residuals, *cotangents), None


_scan.defvjp(_scan_forward, _scan_backward)
