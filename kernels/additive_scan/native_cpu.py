"""The additive scan on CPU in C++ (``native_cpu.cc``), exact for keys of any size."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from .. import native
from ..rows import power_of_two

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
CHUNK = 16  # tokens: more cost more within the chunk than they save at the state
LONGEST = 64  # of a chunk; a longer one that is asked for is taken in several


def supports(q, k, v, f, state, run, *, scale, chunk, stride) -> str | None:
    """Why these arguments of ``forward`` do not fit, or None."""
    del q, k, v, f, state, run, scale, chunk, stride
    return why_not()


def why_not() -> str | None:
    """Why these functions cannot run on this machine, or None."""
    return native.why_not(SOURCE, ("additive_scan_forward", "additive_scan_backward"))


def forward(q, k, v, f, state, run, *, scale, chunk, stride):
    """Outputs, final state and the states at the start of all strides, as in ``backends.py``."""
    dtype, strides = state[0].dtype, -(-q.shape[1] // stride)
    final = [jax.ShapeDtypeStruct(x.shape, dtype) for x in state]
    # A single stride begins with what the row begins with: one state less to write.
    written = strides if strides > 1 else 0
    starts = [jax.ShapeDtypeStruct((written, *x.shape), dtype) for x in state]
    o = jax.ShapeDtypeStruct(v.shape, dtype)
    inputs = (*_inputs(dtype, q, k, v, f), *state, native.or_nothing(run, jnp.int32))
    o, *states = _call("forward", [o, *final, *starts], inputs, {4: 1, 5: 2}, scale, chunk, stride)
    starts = states[2:] if written else (x[None] for x in state)
    return o.astype(q.dtype), tuple(states[:2]), tuple(starts)


def backward(q, k, v, f, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of the inputs and of the initial state, as in ``backends.py``."""
    dtype = starts[0].dtype
    inputs = _inputs(dtype, q, k, v, f)
    outputs = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (*inputs, *final)]
    given = (*starts, final[0], *(x.astype(dtype) for x in (do, *dfinal)))
    inputs = (*inputs, native.or_nothing(run, jnp.int32), *given)
    *gradients, ds, dz = _call("backward", outputs, inputs, {9: 4, 10: 5}, scale, chunk, stride)
    pairs = zip(gradients, (q, k, v, f), strict=True)
    return *(None if x is None else dx.astype(x.dtype) for dx, x in pairs), (ds, dz)


def _call(name: str, outputs, inputs, in_place, scale: float, chunk: int | None, stride: int):
    chunk = min(chunk or CHUNK, LONGEST, power_of_two(inputs[0].shape[1]))
    sizes = {"chunk": np.int64(chunk), "stride": np.int64(stride)}
    name = f"additive_scan_{name}"
    return native.call(name, outputs, inputs, in_place, scale=np.float64(scale), **sizes)


def _inputs(dtype, q, k, v, f):
    return (*(x.astype(dtype) for x in (q, k, v)), native.or_nothing(f, dtype))
