"""Baselines in LightNet's place: softmax attention, linear attention, gated linear attention.

Dimensions: B batch, T tokens, H heads, K key, V value; X chunks of C tokens.

All take q, k [B, T, H, K] and v [B, T, H, V], and keys whose mask is False do not count.
"""

import functools

import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype

CHUNK = 32  # tokens
MIN_LOG_DECAY = -2.5  # per token: exp(32 * 2.5) is still a float32

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def softmax_attention(q, k, v, *, causal: bool, scale: float, mask=None, segment_ids=None):
    """o_i = sum_j softmax_j(scale <q_i, k_j>) v_j: [B, T, H, V] in q's dtype."""
    allowed = jnp.ones((1, 1, q.shape[1], q.shape[1]), bool)
    if causal:
        allowed = jnp.tril(allowed)
    if mask is not None:
        allowed &= mask[:, None, None]
    if segment_ids is not None:
        allowed &= (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    wide = accumulation_dtype(q.dtype)
    logits_BHTT = scale * _einsum("bihk,bjhk->bhij", q.astype(wide), k.astype(wide))
    lowest = jnp.finfo(wide).min
    weights_BHTT = jax.nn.softmax(jnp.where(allowed, logits_BHTT, lowest), axis=-1)
    return _einsum("bhij,bjhv->bihv", weights_BHTT, v.astype(wide)).astype(q.dtype)


def features(x: jax.Array) -> jax.Array:
    """elu + 1 of linear attention (Katharopoulos et al. 2020)."""
    return jax.nn.elu(x) + 1


def normaliser(q, k, *, causal: bool, start=None) -> tuple[jax.Array, jax.Array]:
    """<q_i, sum_j k_j> [B, T, H], the denominator of linear attention, and the sum [B, H, K].

    ``start`` [B, H, K] is the sum over earlier tokens.
    """
    wide = accumulation_dtype(q.dtype)
    total = jnp.cumsum(k.astype(wide), axis=1) if causal else jnp.sum(k, 1, wide, keepdims=True)
    if start is not None:
        total = total + start[:, None]
    return jnp.sum(q.astype(wide) * total, axis=-1), total[:, -1]


def gated_linear_attention(q, k, v, g=None, *, state=None):
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t (Yang et al. 2024), in chunks.

    Args:
      g: [B, T, H, K] log decays in [MIN_LOG_DECAY, 0], or None for no decay.
      state: [B, H, K, V], or None for zeros.

    Returns:
      o [B, T, H, V] in q's dtype, and the state after the last token, float32 or better.
    """
    batch, tokens, heads, key_dim = q.shape
    wide = accumulation_dtype(q.dtype)
    size = min(CHUNK, tokens)

    def cut(x):
        x = jnp.pad(x.astype(wide), ((0, 0), (0, -tokens % size), (0, 0), (0, 0)))
        return x.reshape(batch, -1, size, *x.shape[2:])

    q_BXCHK, k_BXCHK, v_BXCHV = cut(q), cut(k), cut(v)
    kept_BXHK = None
    left_BXCHK = k_BXCHK
    if g is not None:
        sum_BXCHK = jnp.cumsum(cut(g), axis=2)
        q_BXCHK = q_BXCHK * jnp.exp(sum_BXCHK)
        left_BXCHK = k_BXCHK * jnp.exp(sum_BXCHK[:, :, -1:] - sum_BXCHK)
        k_BXCHK = k_BXCHK * jnp.exp(-sum_BXCHK)
        kept_BXHK = jnp.exp(sum_BXCHK[:, :, -1])
    inside_BXHCC = jnp.tril(_einsum("bxihk,bxjhk->bxhij", q_BXCHK, k_BXCHK))
    o_BXCHV = _einsum("bxhij,bxjhv->bxihv", inside_BXHCC, v_BXCHV)
    new_BXHKV = _einsum("bxchk,bxchv->bxhkv", left_BXCHK, v_BXCHV)
    if state is None:
        state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), wide)

    def chunk(s_BHKV, update):
        new_BHKV, kept_BHK = update
        kept = s_BHKV if kept_BHK is None else kept_BHK[..., None] * s_BHKV
        return kept + new_BHKV, s_BHKV

    first = lambda x: jnp.moveaxis(x, 1, 0)
    state, before = jax.lax.scan(chunk, state, jax.tree.map(first, (new_BXHKV, kept_BXHK)))
    o_BXCHV = o_BXCHV + _einsum("bxchk,xbhkv->bxchv", q_BXCHK, before)
    o_BTHV = o_BXCHV.reshape(batch, -1, *o_BXCHV.shape[3:])[:, :tokens]
    return o_BTHV.astype(q.dtype), state


def two_scans(q, k, v, g) -> jax.Array:
    """Gated linear attention forward plus backward over the tokens: [B, T, H, V]."""
    forward, _ = gated_linear_attention(q, k, v, g)
    flipped = (jnp.flip(x, axis=1) for x in (q, k, v, g))
    return forward + jnp.flip(gated_linear_attention(*flipped)[0], axis=1)
