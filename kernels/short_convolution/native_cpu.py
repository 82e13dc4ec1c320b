"""The short convolution on CPU in C++ (``native_cpu.cc``): one pass over memory each way.

The backward computes what it needs of the forward anew, so that nothing but the inputs is kept.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from .. import native
from ..dtypes import accumulation_dtype
from ..per_device import not_divided, per_device

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
CHANNELS = {1: "H", 2: "HK", 3: "NHK"}  # by their dimensions: on a mesh H is divided


def supports(x, kernel, history, segments, *, activation) -> str | None:
    """Why these arguments do not fit, or None."""
    del activation
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"it takes floating-point numbers, not {x.dtype}"
    return why_not() or not_divided(_dimensions(x), (x, kernel, history, segments))


def why_not() -> str | None:
    """Why these functions cannot run on this machine, or None."""
    return native.why_not(SOURCE, ("short_convolution", "short_convolution_backward"))


def short_convolution(x, kernel, history, segments, *, activation):
    """As ``xla.py``; in float32 or better."""
    wide = accumulation_dtype(x.dtype)
    arrays = jax.tree.map(lambda array: array.astype(wide), (x, kernel, history))
    y: jax.Array = _convolve(*arrays, segments, activation == "silu")
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve(x, kernel, history, segments, silu: bool):
    run = per_device(functools.partial(_forward, silu), _dimensions(x), _dimensions(x)[0])
    return run(x, kernel, history, segments)


def _convolve_forward(x, kernel, history, segments, silu: bool):
    return _convolve(x, kernel, history, segments, silu), (x, kernel, history, segments)


def _convolve_backward(silu: bool, inputs, dy):
    rows, kernel, before, segments = _dimensions(dy)
    outputs = (rows, "B" + kernel, before)  # a gradient of the kernel for every row
    run = per_device(
        functools.partial(_backward, silu), (rows, kernel, before, segments, rows), outputs
    )
    dx, dkernel, dhistory = run(*inputs, dy)
    return dx, jnp.sum(dkernel, axis=0), None if inputs[2] is None else dhistory, None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _dimensions(x) -> tuple[str, ...]:
    """Of inputs, kernel, history and segments, as ``per_device`` wants them."""
    channels = CHANNELS[x.ndim - 2]
    return f"BT{channels}", f"W{channels}", f"BW{channels}", "BT"


def _forward(silu: bool, x, kernel, history, segments):
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    inputs = _inputs(x, kernel, history, segments)
    return native.call("short_convolution", outputs, inputs, silu=np.bool_(silu))[0]


def _backward(silu: bool, x, kernel, history, segments, dy):
    """Gradients of x, of the kernel in every row, [B, W, *D], and of the history."""
    (batch, *_), (taps, *channels) = x.shape, kernel.shape
    shapes = (x.shape, (batch, taps, *channels), (batch, taps - 1, *channels))
    outputs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]
    inputs = (*_inputs(x, kernel, history, segments), dy)
    return tuple(native.call("short_convolution_backward", outputs, inputs, silu=np.bool_(silu)))


def _inputs(x, kernel, history, segments):
    return x, kernel, native.or_nothing(history, x.dtype), native.or_nothing(segments, jnp.int32)
