"""What a backend of a scan provides, and how a forward and a backward join.

Every backend of a scan leaves the same residuals: the inputs, the final state, and the state at the
start of every stride of tokens. So the forward of one can run with the backward of another, and a
new backend is a file with two functions and an entry in the ``BACKENDS`` of the scan's ``api.py``:

  forward(*arrays, state, run, *, scale, chunk, stride) -> o, final, starts
  backward(*arrays, run, starts, final, do, dfinal, *, scale, chunk, stride) -> *darrays, dstate

  arrays: the inputs with a token axis, see the scan's ``contract.py``; some may be None
  o, do [B, T, H, V]
  state, final, dfinal, dstate: in the accumulation dtype, see there
  starts: as the state with a leading X = ceil(T / stride): what token x * stride meets, before it
      is decayed or cleared
  run [B, T] int32, how often the state was cleared up to and with the token, or None; the state
      is cleared before every token whose number is not that of the token before it (0 at the start)
  chunk: tokens computed at once, or None for the backend's choice; it divides the stride
  stride: a power of two

Gradients have the dtype of what they belong to; None for None.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax

from .dispatch import Implementation
from .per_device import not_divided, per_device
from .rows import power_of_two, resets_so_far

SHORTEST = 16  # tokens of a stride: shorter rows are padded


class Backend(NamedTuple):
    """The two functions, what they support, and whether the compiler can divide them.

    ``supports`` takes the arguments of ``forward`` and returns None or the reason why not.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *args, **options: None
    divisible: bool = True


class Contract(NamedTuple):
    """What distinguishes one scan from another.

    Attributes:
      arrays: the dimensions of each, as a string of letters: B rows, T tokens, H heads, ...
      state: the same of the state, a string or a tuple of them.
      longest: arrays -> tokens between two states that are kept, at most; a power of two.
    """

    arrays: tuple[str, ...]
    state: Any
    longest: Callable[..., int]


class _Static(NamedTuple):
    contract: Contract
    forward: Backend
    backward: Backend
    scale: float
    chunk: int | None
    stride: int

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        options = {"scale": self.scale, "chunk": self.chunk, "stride": self.stride}
        return functools.partial(function, **options)


def implementation(contract: Contract, backend: Backend, **options: Any) -> Implementation:
    """A backend's forward with its own backward, as an entry of a table of ``dispatch``."""
    both = {"contract": contract, "forward": backend, "backward": backend}
    return Implementation(
        functools.partial(scan, **both), functools.partial(supports, **both), **options
    )


def scan(*arguments: Any, **options: Any) -> Any:
    """The scan of a contract with one backend's forward and one's backward.

    Args:
      *arguments: arrays, state, and reset [B, T] bool or None, as in the scan's ``reference.py``.
      **options: scale, chunk_size, contract, forward and backward.

    Returns:
      o, and the final state.
    """
    *arrays, state, reset = arguments
    return _scan(tuple(arrays), state, resets_so_far(reset), _static(arrays, **options))


def supports(*arguments: Any, **options: Any) -> str | None:
    """Why :func:`scan` cannot run on these arguments, or None."""
    *arrays, state, reset = arguments
    static = _static(arrays, **options)
    contract = static.contract
    for backend in (static.forward, static.backward):
        given = (*arrays, state, resets_so_far(reset))
        reason = static.bind(backend.supports)(*given)
        if reason is None and not backend.divisible:
            reason = not_divided(_inputs(contract), given)
        if reason is not None:
            return reason
    return None


def _static(arrays, *, scale, chunk_size, contract, forward, backward) -> _Static:
    whole = power_of_two(arrays[0].shape[1])
    stride = min(max(whole, SHORTEST), contract.longest(*arrays))
    chunk = None if chunk_size is None else min(power_of_two(chunk_size), whole)
    return _Static(contract, forward, backward, float(scale), chunk, max(stride, chunk or 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(arrays, state, run, static: _Static):
    return _scan_forward(arrays, state, run, static)[0]


def _scan_forward(arrays, state, run, static: _Static):
    contract, function = static.contract, static.bind(static.forward.forward)
    if not static.forward.divisible:
        outputs = ("BTHV", contract.state, _starts(contract))
        function = per_device(function, _inputs(contract), outputs)
    o, final, starts = function(*arrays, state, run)
    return (o, final), (arrays, run, starts, final)


def _scan_backward(static: _Static, residuals, cotangents):
    (arrays, *others), contract = residuals, static.contract
    function = static.bind(static.backward.backward)
    if not static.backward.divisible:
        inputs = (*contract.arrays, "BT", _starts(contract), contract.state, "BTHV", contract.state)
        function = per_device(function, inputs, (*contract.arrays, contract.state))
    *darrays, dstate = function(*arrays, *others, *cotangents)
    return tuple(darrays), dstate, None


def _inputs(contract: Contract):
    return (*contract.arrays, contract.state, "BT")


def _starts(contract: Contract):
    return jax.tree.map(lambda dimensions: "X" + dimensions, contract.state)


_scan.defvjp(_scan_forward, _scan_backward)
