"""Public functions of the DeltaProduct scan: argument checks, then dispatch."""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .. import dispatch
from ..backends import Backend, implementation as implementation_of
from ..dtypes import accumulation_dtype
from . import native_cpu, pallas_gpu, pallas_tpu, reference, xla
from .contract import CONTRACT

BACKENDS = {
    "xla": Backend(xla.forward, xla.backward),
    "native_cpu": Backend(
        *(native_cpu.forward, native_cpu.backward, native_cpu.supports), divisible=False
    ),
    "pallas_tpu": Backend(
        *(pallas_tpu.forward, pallas_tpu.backward, pallas_tpu.supports), divisible=False
    ),
    "pallas_gpu": Backend(
        *(pallas_gpu.forward, pallas_gpu.backward, pallas_gpu.supports), divisible=False
    ),
}

IMPLEMENTATIONS = {
    "pallas_tpu": implementation_of(
        CONTRACT, BACKENDS["pallas_tpu"], platforms=("tpu",), measured=True
    ),
    "pallas_gpu": implementation_of(
        CONTRACT, BACKENDS["pallas_gpu"], platforms=("gpu",), measured=True
    ),
    "native_cpu": implementation_of(
        CONTRACT, BACKENDS["native_cpu"], platforms=("cpu",), measured=True
    ),
    "xla": implementation_of(CONTRACT, BACKENDS["xla"]),
    "reference": dispatch.Implementation(reference.delta_product_reference),
}
# Of a single token: the chunked forms of plain JAX would compute for a chunk.
STEPS = {name: IMPLEMENTATIONS[name] for name in ("native_cpu", "reference")}


def delta_product(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The (gated) DeltaProduct recurrence over a batch of sequences.

    For every token: S <- exp(g) S; then for each of the N Householder steps
    S <- (I - beta k k^T) S + beta k v^T; then o = scale * S^T q (Siems et al. 2025).
    Differentiable in every float argument, through the outputs and the final state.

    Args:
      q: [B, T, H, K] queries. q and k are expected to be normalised by the caller.
      k: [B, T, N, H, K] keys, step j = 0 is applied first. N is read from the shape.
      v: [B, T, N, H, V] values.
      beta: [B, T, N, H] step sizes in [0, 2]: [0, 1] contracts, (1, 2] reflects as well. The
        range is checked where values are known, which is not so under jit, grad or vmap.
      g: [B, T, H] log decay (<= 0), one per token, applied before the first step; or None.
      scale: factor on o; K**-0.5 if None.
      initial_state: [B, H, K, V]; zeros if None. It belongs to the first token's segment.
      segment_ids: [B, T] integers; the state is cleared wherever the id changes.
      implementation: "reference", "xla", "native_cpu", "pallas_tpu", "pallas_gpu", or None for the
        fastest here.
      chunk_size: tokens per chunk of the chunked implementations, rounded up to a power of two;
        None picks it.

    Returns:
      o: [B, T, H, V] in q's dtype.
      state: [B, H, K, V] after the last token, float32 (float64 for float64 inputs).

    Raises:
      ValueError: if shapes or dtypes do not fit, beta is known to leave its range, or the named
        implementation cannot run.
    """
    _check(q, k, v, beta, g, initial_state, segment_ids, chunk_size)
    batch, _, heads, key_dim = q.shape
    dtype = accumulation_dtype(q.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), dtype)
    reset = None
    if segment_ids is not None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        reset = jnp.pad(changed, ((0, 0), (1, 0)))
    if scale is None:
        scale = key_dim**-0.5
    return dispatch.call(
        "delta_product",
        IMPLEMENTATIONS,
        implementation,
        *(q, k, v, beta, g, initial_state.astype(dtype), reset),
        scale=scale,
        chunk_size=chunk_size,
        size=(q.shape[1], key_dim),
    )


def delta_product_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    state: jax.Array,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of :func:`delta_product`, for decoding.

    Args:
      q: [B, H, K]; k: [B, N, H, K]; v: [B, N, H, V]; beta: [B, N, H]; g: [B, H] or None.
      state: [B, H, K, V].
      scale: factor on o; K**-0.5 if None.

    Returns:
      o [B, H, V] in q's dtype, and the next state in ``state``'s dtype.
    """
    time = lambda x: None if x is None else x[:, None]
    _check(time(q), time(k), time(v), time(beta), time(g), state, None, None)
    dtype = accumulation_dtype(q.dtype)
    o, new = dispatch.call(
        "delta_product",
        STEPS,
        None,
        *(time(q.astype(dtype)), time(k), time(v), time(beta), time(g)),
        *(state.astype(dtype), None),
        scale=1.0,
        chunk_size=None,
        size=(1, q.shape[-1]),
    )
    o = o[:, 0] * (q.shape[-1] ** -0.5 if scale is None else scale)  # which may be traced
    return o.astype(q.dtype), new.astype(state.dtype)


def _check(q, k, v, beta, g, state, segment_ids, chunk_size):
    if q.ndim != 4 or k.ndim != 5 or v.ndim != 5:
        raise ValueError(
            "delta_product takes q [B,T,H,K], k [B,T,N,H,K], v [B,T,N,H,V]; got shapes"
            f" {q.shape}, {k.shape}, {v.shape}"
        )
    batch, tokens, heads, key_dim = q.shape
    steps, value_dim = k.shape[2], v.shape[-1]
    if steps < 1 or tokens < 1:
        raise ValueError(f"delta_product needs T >= 1 and N >= 1; got T={tokens}, N={steps}")
    expected = {
        "k": (k, (batch, tokens, steps, heads, key_dim)),
        "v": (v, (batch, tokens, steps, heads, value_dim)),
        "beta": (beta, (batch, tokens, steps, heads)),
        "g": (g, (batch, tokens, heads)),
        "initial_state": (state, (batch, heads, key_dim, value_dim)),
        "segment_ids": (segment_ids, (batch, tokens)),
    }
    for name, (array, shape) in expected.items():
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(
                f"delta_product: {name} has shape {array.shape}, expected {shape} from"
                f" q {q.shape}, k {k.shape} and v {v.shape}"
            )
        kind = jnp.integer if name == "segment_ids" else jnp.floating
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"delta_product: {name} must be {kind.__name__}, got {array.dtype}")
    known = isinstance(beta, np.ndarray | jax.Array) and not isinstance(beta, jax.core.Tracer)
    if known and beta.size:
        values = np.asarray(beta)  # not by jnp, which a trace around this would record
        if not (0 <= values.min() and values.max() <= 2):
            raise ValueError(
                f"delta_product: beta must lie in [0, 2], got {values.min()} to {values.max()}:"
                " other step sizes let the state grow without bound"
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"delta_product: chunk_size must be positive, got {chunk_size}")
