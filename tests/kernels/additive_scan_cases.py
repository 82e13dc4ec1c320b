"""Cases of the additive scan for its kernels, and its definition.

The rows of a batch hold keys of all kinds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from scanax.kernels.additive_scan import native_cpu, reference

# What runs on any machine; the kernels in C++ need a compiler (``test_native.py`` says if not).
IMPLEMENTATIONS = ("reference", "xla", *(("native_cpu",) if native_cpu.why_not() is None else ()))

KINDS = ("normal", "rising", "falling", "constant", "huge", "holes", "waiting", "empty", "jump")
SEGMENTS = ((), (0,), (1, 2), (16,), (15, 17), (5, 32), (25, 33), (7,), ())  # of the rows


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    heads: int
    dims: tuple[int, int]  # K, V
    stride: int
    kinds: tuple[str, ...] = KINDS
    factors: bool = False
    segments: bool = False
    dtype: str = "float32"


def keys(kind: str, generator, shape):
    k, time = generator.normal(size=shape), np.linspace(0, 300, shape[0])[:, None, None]
    return {
        "rising": k + time,
        "falling": k - time,
        "constant": np.full(shape, 7.0),
        "huge": 1e6 * k,
        "holes": np.where(generator.random(shape) < 0.5, -np.inf, k),
        "waiting": np.where(time < generator.integers(0, 250, shape[1:]), -np.inf, k),
        "empty": np.full(shape, -np.inf),
        # Far above what came before, after a token that is not there.
        "jump": np.where(time == 0, -np.inf, k + 100),
    }.get(kind, k)


def arrays(case: Case):
    """q, k, v, f, state and run; and the cotangents of the outputs."""
    generator = np.random.default_rng(0)
    batch, (key_dim, value_dim) = len(case.kinds), case.dims
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    rows = batch, case.tokens, case.heads
    k = np.stack([keys(kind, generator, (*rows[1:], key_dim)) for kind in case.kinds])
    q, k, v = normal(*rows, key_dim), jnp.asarray(k, jnp.float32), normal(*rows, value_dim)
    f = jnp.cos(3 * normal(*rows, key_dim)) if case.factors else None
    q, k, v, f = jax.tree.map(lambda x: x.astype(case.dtype), (q, k, v, f))
    state_shape = batch, case.heads, key_dim, value_dim
    without = np.isin(case.kinds, ("waiting", "empty"))[:, None, None]
    state = normal(*state_shape), jnp.where(without, -jnp.inf, normal(*state_shape[:3]))
    run = None
    if case.segments:
        counts = [np.searchsorted(s, np.arange(case.tokens), side="right") for s in SEGMENTS]
        run = jnp.asarray(np.stack(counts[:batch]), jnp.int32)
    do = normal(*v.shape).astype(case.dtype)
    return (q, k, v, f, state, run), (do, (normal(*state_shape), normal(*state_shape[:3])))


def definition(inputs, cotangents):
    *inputs, run = inputs
    reset = None
    if run is not None:
        reset = jnp.diff(run, axis=1, prepend=0) > 0
    scan = lambda *inputs: reference.additive_scan_reference(*inputs, reset, scale=0.3)
    outputs, pull = jax.vjp(scan, *inputs)
    return outputs, pull(cotangents)
