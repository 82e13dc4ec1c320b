"""DeltaProduct on CPU in C++ (``native_cpu.cc``): chunks that stay in cache between products."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from .. import native
from ..rows import power_of_two

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
MICRO_STEPS = 16  # of a chunk: more cost more within the chunk than they save at the state
LONGEST = 128  # micro-steps; a longer chunk that is asked for is taken in several


def supports(q, k, v, beta, g, state, run, *, scale, chunk, stride) -> str | None:
    """Why these arguments of ``forward`` do not fit, or None."""
    del q, k, v, beta, g, state, run, scale, chunk, stride
    return why_not()


def why_not() -> str | None:
    """Why these functions cannot run on this machine, or None."""
    return native.why_not(SOURCE, ("delta_product_forward", "delta_product_backward"))


def forward(q, k, v, beta, g, state, run, *, scale, chunk, stride):
    """Outputs, final state and the states at the start of all strides, as in ``backends.py``."""
    dtype, strides = state.dtype, -(-q.shape[1] // stride)
    # A single stride begins with what the row begins with: one state less to write.
    starts = jax.ShapeDtypeStruct((strides if strides > 1 else 0, *state.shape), dtype)
    o = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), dtype)
    outputs = [o, jax.ShapeDtypeStruct(state.shape, dtype), starts]
    inputs = [*_inputs(dtype, q, k, v, beta, g), state, native.or_nothing(run, jnp.int32)]
    o, final, starts = _call("forward", outputs, inputs, {5: 1}, scale, chunk, stride)
    return o.astype(q.dtype), final, starts if strides > 1 else state[None]


def backward(q, k, v, beta, g, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of the inputs and of the initial state, as in ``backends.py``."""
    dtype = starts.dtype
    inputs = _inputs(dtype, q, k, v, beta, g)
    outputs = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (*inputs, final)]
    given = (do.astype(dtype), dfinal.astype(dtype))
    inputs = [*inputs, native.or_nothing(run, jnp.int32), starts, *given]
    *gradients, dstate = _call("backward", outputs, inputs, {8: 5}, scale, chunk, stride)
    pairs = zip(gradients, (q, k, v, beta, g), strict=True)
    return *(None if x is None else dx.astype(x.dtype) for dx, x in pairs), dstate


def _call(name: str, outputs, inputs, in_place, scale: float, chunk: int | None, stride: int):
    tokens, steps = inputs[1].shape[1:3]
    within = lambda micro_steps: power_of_two(max(1, micro_steps // steps) + 1) // 2  # tokens
    chunk = min(chunk or within(MICRO_STEPS), within(LONGEST), power_of_two(tokens))
    sizes = {"chunk": np.int64(chunk), "stride": np.int64(stride)}
    name = f"delta_product_{name}"
    return native.call(name, outputs, inputs, in_place, scale=np.float64(scale), **sizes)


def _inputs(dtype, q, k, v, beta, g):
    return (*(x.astype(dtype) for x in (q, k, v, beta)), native.or_nothing(g, dtype))
