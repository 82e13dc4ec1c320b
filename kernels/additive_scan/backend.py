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

from ..per_device import per_device
from ..rows import power_of_two, resets_so_far

CHECKPOINT = 64  # tokens between two states that are kept
SHORTEST = 16  # the same in rows that are shorter, which are padded


STATE = ("BHKV", "BHK")
STARTS = ("XBHKV", "XBHK")
INPUTS = ("BTHK", "BTHK", "BTHV", "BTHK", STATE, "BT")
RESIDUALS = ("BTHK", "BTHK", "BTHV", "BTHK", "BT", STARTS, STATE, "BTHV", STATE)


class Backend(NamedTuple):
    """The two functions, what they support, and whether the compiler can divide them.

    ``supports`` takes the arguments of ``forward`` and returns None or the reason why not.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *args, **options: None
    divisible: bool = True


def scan(q, k, v, f, state, reset, *, scale, chunk_size, forward: Backend, backward: Backend):
    """The scan with one backend's forward and one's backward; arguments as in ``reference.py``."""
    static = (forward, backward, float(scale), *_sizes(q, chunk_size))
    return _scan(q, k, v, f, state, resets_so_far(reset), static)


def supports(
    q, k, v, f, state, reset, *, scale, chunk_size, forward: Backend, backward: Backend
) -> str | None:
    """Why :func:`scan` cannot run on these arguments, or None."""
    chunk, stride = _sizes(q, chunk_size)
    arguments = (q, k, v, f, state, resets_so_far(reset))
    reasons = (
        backend.supports(*arguments, scale=scale, chunk=chunk, stride=stride)
        for backend in (forward, backward)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _sizes(q, chunk_size: int | None) -> tuple[int | None, int]:
    """Chunk and stride."""
    tokens = q.shape[1]
    stride = min(CHECKPOINT, max(power_of_two(tokens), SHORTEST))
    if chunk_size is None:
        return None, stride
    chunk = min(power_of_two(chunk_size), power_of_two(tokens))
    return chunk, max(stride, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _scan(q, k, v, f, state, run, static):
    return _scan_forward(q, k, v, f, state, run, static)[0]


def _scan_forward(q, k, v, f, state, run, static):
    backend, _, scale, chunk, stride = static
    function = functools.partial(backend.forward, scale=scale, chunk=chunk, stride=stride)
    if not backend.divisible:
        function = per_device(function, INPUTS, ("BTHV", STATE, STARTS))
    o, final, starts = function(q, k, v, f, state, run)
    return (o, final), (q, k, v, f, run, starts, final)


def _scan_backward(static, residuals, cotangents):
    _, backend, scale, chunk, stride = static
    function = functools.partial(backend.backward, scale=scale, chunk=chunk, stride=stride)
    if not backend.divisible:
        function = per_device(function, RESIDUALS, INPUTS[:5])
    return *function(*residuals, *cotangents), None


_scan.defvjp(_scan_forward, _scan_backward)
