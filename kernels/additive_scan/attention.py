"""Additive attention without causality: one summary of all tokens, read by every query.

Dimensions: B batch, T tokens, H heads, K key channels, V value; X blocks of C tokens; L = n K
channels of the state, where every weight has n factors.

  S = sum_j softmax_j(k)_j f_j v_j^T  (per key channel, over all T),    o_i = scale * S^T q_i

There is no scan over tokens: the summary is two reductions, taken block by block with a running
maximum, so that the weights exist for one block at a time only. Blocks are read where they lie: the
last one begins early enough to be whole, and the tokens that it shares with the one before it count
once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 1024  # tokens

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def summary(k, v, k_factor, dtype) -> tuple[jax.Array, jax.Array]:
    """S [B, H, L, V] and z [B, H, K], of keys [B, T, H, K] and values [B, T, H, V].

    Factors f [B, T, H, L], or None (L = K), multiply the weights.

    Channels without any key (all -inf) have S = 0 and z = -inf.
    """
    result: Any = _summary(k, v, k_factor, dtype)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summary(k, v, f, dtype):
    return _summary_forward(k, v, f, dtype)[0]


def _summary_forward(k, v, f, dtype):
    batch, tokens, heads, key_dim = k.shape
    copies = 1 if f is None else f.shape[-1] // key_dim
    size, number = _blocks(tokens)

    def block(carry, i):
        top_BHK, total_BHK, s_BHLV = carry
        (k_BCHK, v_BCHV, f_BCHL), first = _cast(_read((k, v, f), i, size), dtype), i * size
        new_C = jnp.minimum(first, tokens - size) + jnp.arange(size, dtype=i.dtype) >= first
        k_BCHK = jnp.where(new_C[None, :, None, None], k_BCHK, -jnp.inf)
        new_BHK = jnp.maximum(top_BHK, jnp.max(k_BCHK, axis=1))
        finite_BHK = jnp.where(new_BHK == -jnp.inf, 0, new_BHK)
        kept_BHK = jnp.exp(top_BHK - finite_BHK)
        weight_BCHK = jnp.exp(k_BCHK - finite_BHK[:, None])
        keys_BCHL = weight_BCHK if f_BCHL is None else _tile(weight_BCHK, copies) * f_BCHL
        s_BHLV = _tile(kept_BHK, copies)[..., None] * s_BHLV
        s_BHLV = s_BHLV + _einsum("bchl,bchv->bhlv", keys_BCHL, v_BCHV)
        return (new_BHK, kept_BHK * total_BHK + jnp.sum(weight_BCHK, axis=1), s_BHLV), None

    start = (
        jnp.full((batch, heads, key_dim), -jnp.inf, dtype),
        jnp.zeros((batch, heads, key_dim), dtype),
        jnp.zeros((batch, heads, copies * key_dim, v.shape[-1]), dtype),
    )
    (top, total, s), _ = jax.lax.scan(block, start, number)
    s = s / _tile(jnp.where(total == 0, 1, total), copies)[..., None]
    z = top + jnp.log(total)
    return (s, z), (k, v, f, s, z)


def _summary_backward(dtype, residuals, cotangents):
    k, v, f, s_BHLV, z_BHK = residuals
    ds_BHLV, dz_BHK = cotangents
    copies = 1 if f is None else f.shape[-1] // k.shape[-1]
    over_copies = lambda x: jnp.sum(x.reshape(*x.shape[:-1], copies, -1), axis=-2)
    finite_BHK = jnp.where(z_BHK == -jnp.inf, 0, z_BHK)
    through_z_BHK = dz_BHK - over_copies(jnp.sum(ds_BHLV * s_BHLV, axis=-1))

    size, number = _blocks(k.shape[1])

    def block(gradients, i):
        k_BCHK, v_BCHV, f_BCHL = _cast(_read((k, v, f), i, size), dtype)
        weight_BCHK = jnp.exp(k_BCHK - finite_BHK[:, None])
        dkey = _einsum("bchv,bhlv->bchl", v_BCHV, ds_BHLV)
        if f is None or f_BCHL is None:
            keys_BCHL, dweight, df = weight_BCHK, dkey, None
        else:
            weights_BCHL = _tile(weight_BCHK, copies)
            keys_BCHL, dweight = weights_BCHL * f_BCHL, over_copies(dkey * f_BCHL)
            df = (dkey * weights_BCHL).astype(f.dtype)
        dv = _einsum("bchl,bhlv->bchv", keys_BCHL, ds_BHLV)
        dk = weight_BCHK * (dweight + through_z_BHK[:, None])
        # What two blocks share gets the same gradient from both.
        new = (dk.astype(k.dtype), dv.astype(v.dtype), df)
        put = lambda whole, d: jax.lax.dynamic_update_slice_in_dim(whole, d, i * size, axis=1)
        return jax.tree.map(put, gradients, new), None

    return jax.lax.scan(block, jax.tree.map(jnp.zeros_like, (k, v, f)), number)[0]


_summary.defvjp(_summary_forward, _summary_backward)


def read(q, s, scale: float) -> jax.Array:
    """o [B, T, H, V] in q's dtype, of queries [B, T, H, L]."""
    return (scale * _einsum("bthl,bhlv->bthv", q.astype(s.dtype), s)).astype(q.dtype)


def _tile(x, copies: int):
    return x if copies == 1 else jnp.concatenate([x] * copies, axis=-1)


def _cast(arrays, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), arrays)  # None stays None


def _blocks(tokens: int) -> tuple[int, jax.Array]:
    """Tokens of a block, and the numbers [X] of the blocks."""
    size = min(BLOCK, tokens)
    return size, jnp.arange(-(-tokens // size), dtype=jnp.int32)


def _read(arrays, i, size: int):
    """Block i of each [B, T, H, D]: [B, C, H, D]; the last begins where it is still whole."""
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)
    return jax.tree.map(part, arrays)  # None stays None
