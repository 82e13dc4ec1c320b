"""Public functions of the additive scan: argument checks, then dispatch."""

from typing import Any

import jax
import jax.numpy as jnp

from .. import dispatch
from ..backends import Backend, implementation as implementation_of
from ..dtypes import accumulation_dtype
from . import attention, native_cpu, pallas_gpu, pallas_tpu, reference, xla
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
    "reference": dispatch.Implementation(reference.additive_scan_reference),
}
# Of a single token: the chunked forms of plain JAX would compute for a chunk.
STEPS = {name: IMPLEMENTATIONS[name] for name in ("native_cpu", "reference")}


def additive_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    k_factor: jax.Array | None = None,
    scale: float | None = None,
    initial_state: tuple[jax.Array, jax.Array | None] | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, reference.State]:
    """The additive linear recurrence over a batch of sequences, causal.

    Per key channel the state is the average of the values so far, weighted by a softmax of the
    key logits over time: z_t = logaddexp(z_{t-1}, k_t); S_t = exp(z_{t-1} - z_t) S_{t-1} +
    exp(k_t - z_t) v_t^T; o_t = scale * S_t^T q_t (Qin et al. 2024, LightNet). Differentiable in
    every float argument, through the outputs and both parts of the final state.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] key logits, of any size; -inf is a token that the channel does not see.
      v: [B, T, H, V] values.
      k_factor: [B, T, H, K] on the weights exp(k - z), of any sign, without effect on z: positions
        that turn a key after its normalisation; ones if None. Or [B, T, H, n K], n factors one
        after the other for each weight: q and both parts of the state are n K wide as well.
      scale: factor on o; K**-0.5 if None.
      initial_state: (S [B, H, K, V], z [B, H, K]), which counts as one earlier token of logit z and
        value S; (0, -inf) if None. With z None or -inf, S does not decay at the first token.
      mask: [B, T] bool, True = a token. Where False the state stays and o is 0; v must be finite.
      segment_ids: [B, T] integers; the state is cleared wherever the id changes.
      implementation: "reference", "xla", "native_cpu", "pallas_tpu", "pallas_gpu", or None for the
        fastest here.
      chunk_size: tokens per chunk of the chunked implementations, rounded up to a power of two;
        None picks it.

    Returns:
      o: [B, T, H, V] in q's dtype.
      (S, z): the state after the last token, float32 (float64 for float64 inputs).

    Raises:
      ValueError: if shapes or dtypes do not fit, or the named implementation cannot run.
    """
    s, z = (None, None) if initial_state is None else initial_state
    _check("additive_scan", q, k, v, k_factor, s, z, mask, segment_ids)
    k = _widen(k, q.shape[-1])
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"additive_scan: chunk_size must be positive, got {chunk_size}")
    batch, _, heads, key_dim = q.shape
    dtype = accumulation_dtype(q.dtype)
    s = jnp.zeros((batch, heads, key_dim, v.shape[-1]), dtype) if s is None else s.astype(dtype)
    z = jnp.full((batch, heads, key_dim), -jnp.inf, dtype) if z is None else z.astype(dtype)
    reset = None
    if segment_ids is not None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        reset = jnp.pad(changed, ((0, 0), (1, 0)))
    o, state = dispatch.call(
        "additive_scan",
        IMPLEMENTATIONS,
        implementation,
        *(q, _masked(k, mask), v, k_factor, (s, z), reset),
        scale=key_dim**-0.5 if scale is None else scale,
        chunk_size=chunk_size,
        size=(q.shape[1], key_dim),
    )
    return o if mask is None else jnp.where(mask[:, :, None, None], o, 0), state


def additive_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: reference.State,
    *,
    k_factor: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, reference.State]:
    """One token of :func:`additive_scan`, for decoding.

    Args:
      q, k: [B, H, K]; v: [B, H, V].
      state: (S [B, H, K, V], z [B, H, K]).
      k_factor: [B, H, K] or None; or [B, H, n K], see there.
      scale: factor on o; K**-0.5 if None.

    Returns:
      o [B, H, V] in q's dtype, and the next state in the state's dtype.
    """
    time = lambda x: None if x is None else x[:, None]
    _check("additive_step", time(q), time(k), time(v), time(k_factor), *state, None, None)
    dtype = accumulation_dtype(q.dtype)
    k = _widen(k, q.shape[-1])
    o, new = dispatch.call(
        "additive_scan",
        STEPS,
        None,
        *(time(q.astype(dtype)), time(k), time(v), time(k_factor)),
        *(jax.tree.map(lambda x: x.astype(dtype), tuple(state)), None),
        scale=1.0,
        chunk_size=None,
        size=(1, q.shape[-1]),
    )
    o = o[:, 0] * (q.shape[-1] ** -0.5 if scale is None else scale)  # which may be traced
    new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, tuple(state))
    return o.astype(q.dtype), new


def additive_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    k_factor: jax.Array | None = None,
    scale: float | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Every query reads the same summary of all tokens: no order, no scan, linear in T.

    The summary is what the state of :func:`additive_scan` is after the last token (Qin et al. 2024,
    LightNet). Grids are flattened by the caller.

    Args:
      q, k: [B, T, H, K]; k are logits, of any size.
      v: [B, T, H, V].
      k_factor: [B, T, H, K] on the weights, or None; or [B, T, H, n K], as q then is.
      scale: factor on o; K**-0.5 if None.
      mask: [B, T] bool, True = a token; the others are neither summarised nor answered (o = 0). A
        row without any token gives zeros.

    Returns:
      o: [B, T, H, V] in q's dtype.

    Raises:
      ValueError: if shapes or dtypes do not fit.
    """
    _check("additive_attention", q, k, v, k_factor, None, None, mask, None)
    s, _ = attention.summary(_masked(k, mask), v, k_factor, accumulation_dtype(q.dtype))
    o = attention.read(q, s, q.shape[-1] ** -0.5 if scale is None else scale)
    return o if mask is None else jnp.where(mask[:, :, None, None], o, 0)


def _masked(k, mask):
    return k if mask is None else jnp.where(mask[:, :, None, None], k, -jnp.inf)


def _widen(k, width: int):
    """The keys once for each factor."""
    copies = width // k.shape[-1]
    return k if copies == 1 else jnp.concatenate([k] * copies, axis=-1)


def _check(name: str, q, k, v, f, s, z, mask, segment_ids):
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"{name} takes q, k [B,T,H,K] and v [B,T,H,V] (a step: without T); got shapes"
            f" {q.shape}, {k.shape}, {v.shape}"
        )
    batch, tokens, heads, key_dim = q.shape
    if tokens < 1:
        raise ValueError(f"{name} needs T >= 1; got q {q.shape}")
    floating: Any = jnp.floating
    several = f is not None and k.ndim == 4 and k.shape[-1] and not key_dim % k.shape[-1]
    narrow = k.shape[-1] if several else key_dim
    expected = {
        "k": (k, (batch, tokens, heads, narrow), floating),
        "v": (v, (batch, tokens, heads, v.shape[-1]), floating),
        "k_factor": (f, (batch, tokens, heads, key_dim), floating),
        "initial_state[0]": (s, (batch, heads, key_dim, v.shape[-1]), floating),
        "initial_state[1]": (z, (batch, heads, key_dim), floating),
        "mask": (mask, (batch, tokens), jnp.bool_),
        "segment_ids": (segment_ids, (batch, tokens), jnp.integer),
    }
    for part, (array, shape, kind) in expected.items():
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(
                f"{name}: {part} has shape {array.shape}, expected {shape} from q {q.shape} and"
                f" v {v.shape}"
            )
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name}: {part} must be {kind.__name__}, got {array.dtype}")
