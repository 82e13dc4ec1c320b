"""DeltaProduct on CPU in C++ (``native_cpu.cc``): chunks that stay in cache between products."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from .. import native
from ..rows import power_of_two

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
MICRO_STEPS = 16  # of a chunk: more cost more within the chunk than they save at the state


def supports(q, k, v, beta, g, state, run, *, scale, chunk, stride) -> str | None:
    """Why these arguments of ``forward`` do not fit, or None."""
    del q, k, v, beta, g, state, run, scale, chunk, stride
    return why_not()


def why_not() -> str | None:
    """Why these functions cannot run on this machine, or None."""
    return native.why_not(SOURCE, ("delta_product_forward", "delta_product_backward"))


def forward(q, k, v, beta, g, state, run, *, scale, chunk, stride):
    """Outputs, final state and the states at the start of all strides, as in ``backends.py``."""
    batch, tokens, heads, _ = q.shape
    shape = jax.ShapeDtypeStruct
    starts = shape((-(-tokens // stride), *state.shape), state.dtype)
    o = shape((batch, tokens, heads, v.shape[-1]), state.dtype)
    outputs = [o, shape(state.shape, state.dtype), starts]
    inputs = [*_inputs(state.dtype, q, k, v, beta, g), state, native.or_nothing(run, jnp.int32)]
    o, final, starts = _call("forward", outputs, inputs, scale, chunk, stride)
    return o.astype(q.dtype), final, starts


def backward(q, k, v, beta, g, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of the inputs and of the initial state, as in ``backends.py``."""
    dtype = starts.dtype
    inputs = _inputs(dtype, q, k, v, beta, g)
    outputs = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (*inputs, final)]
    given = (do.astype(dtype), dfinal.astype(dtype))
    inputs = [*inputs, native.or_nothing(run, jnp.int32), starts, *given]
    *gradients, dstate = _call("backward", outputs, inputs, scale, chunk, stride)
    pairs = zip(gradients, (q, k, v, beta, g), strict=True)
    return *(None if x is None else dx.astype(x.dtype) for dx, x in pairs), dstate


def _call(name: str, outputs, inputs, scale: float, chunk: int | None, stride: int):
    steps = inputs[1].shape[2]
    chunk = chunk or min(power_of_two(max(1, MICRO_STEPS // steps) + 1) // 2, stride)
    sizes = {"chunk": np.int64(chunk), "stride": np.int64(stride)}
    return native.call(f"delta_product_{name}", outputs, inputs, scale=np.float64(scale), **sizes)


def _inputs(dtype, q, k, v, beta, g):
    return (*(x.astype(dtype) for x in (q, k, v, beta)), native.or_nothing(g, dtype))
