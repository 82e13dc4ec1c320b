"""Cases of the DeltaProduct scan for its kernels, and what the definition says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from scanax.kernels.delta_product import native_cpu
from scanax.kernels.delta_product.reference import delta_product_reference

# What runs on any machine; the kernels in C++ need a compiler (``test_native.py`` says if not).
IMPLEMENTATIONS = ("reference", "xla", *(("native_cpu",) if native_cpu.why_not() is None else ()))
NAMES = ("q", "k", "v", "beta", "g", "state")


@dataclasses.dataclass(frozen=True)
class Case:
    """B, T, H, K, V, N and what is switched on."""

    shape: tuple[int, int, int, int, int, int]
    gated: bool = False
    segments: tuple[int, ...] = ()  # the tokens that start a segment
    beta: str = "(0, 2)"
    keys: str = "sphere"
    decay: float = 0.3
    chunk: int | None = None
    stride: int = 16


def arrays(case: Case, dtype=np.float32):
    """Inputs by name, rounded to what ``dtype`` holds, in float64; q, k of unit length."""
    batch, tokens, heads, key_dim, value_dim, steps = case.shape
    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.normal(size=shape)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    beta = 2 / (1 + np.exp(-normal(batch, tokens, steps, heads)))
    if case.beta == "ends":
        beta = np.round(beta / 2) * 2
    keys = normal(batch, tokens, steps, heads, key_dim)
    keys = np.abs(keys) if case.keys == "cone" else keys
    inputs = (
        unit(normal(batch, tokens, heads, key_dim)),
        unit(keys),
        normal(batch, tokens, steps, heads, value_dim),
        beta,
        -np.abs(normal(batch, tokens, heads)) * case.decay if case.gated else None,
    )
    rounded = [None if x is None else x.astype(dtype).astype(np.float64) for x in inputs]
    return (*rounded, normal(batch, heads, key_dim, value_dim))


def runs(case: Case):
    """[B, T] resets so far, or None."""
    if not case.segments:
        return None
    batch, tokens = case.shape[:2]
    run = np.searchsorted(case.segments, np.arange(tokens), side="right")
    return np.broadcast_to(run, (batch, tokens)).astype(np.int32)


def cotangents(case: Case):
    batch, tokens, heads, key_dim, value_dim, _ = case.shape
    wave = lambda *shape: np.cos(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)
    return wave(batch, tokens, heads, value_dim), wave(batch, heads, key_dim, value_dim)


def defined(case: Case, inputs):
    """(o, state) and the gradients by every input, from the definition in float64."""
    run = runs(case)
    reset = None if run is None else jnp.asarray(np.diff(run, axis=1, prepend=0) > 0)
    scale = case.shape[3] ** -0.5
    forward = lambda *inputs: delta_product_reference(*inputs, reset, scale=scale)
    with jax.enable_x64(True):
        outputs, pull = jax.vjp(jax.jit(forward), *inputs)
        return jax.device_get((outputs, pull(cotangents(case))))
