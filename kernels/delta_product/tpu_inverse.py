"""(I + A)^-1 inside the TPU kernels of DeltaProduct, and what it shares with them.

Micro-steps are ordered step by step, see ``pallas_tpu.py``: their true order stands in ``number``.
"""

import functools

import jax
import jax.numpy as jnp

from .tpu_layout import Sizes

BLOCK = 16  # tokens: rows of a bfloat16 tile


def inverse(sizes: Sizes, a_LL) -> jax.Array:
    """(I + A)^{-1} by merging blocks, as in ``chunk.py``: X - X A_b X = (I - X A_b) X.

    X is block diagonal, so it is kept as the rows of one block, side by side for all blocks:
    [h, N * block, L] for blocks of so many tokens. Micro-steps meet in the merge of blocks of b
    where b is the highest bit in which their numbers differ.
    """
    dot = functools.partial(dot_general, sizes.operand)
    differ_LL = _differ(sizes)
    numbers = 1 << (sizes.steps - 1).bit_length()  # per token
    eye_LL = jnp.where(differ_LL == 0, 1.0, 0.0)
    block = min(BLOCK, sizes.chunk)
    eye_bL = _block_rows(sizes, block, eye_LL)
    x_bL = eye_bL - _block_rows(sizes, block, jnp.where(differ_LL == 1, a_LL, 0))
    for level in range(1, (sizes.chunk * numbers - 1).bit_length()):
        x_bL = x_bL.astype(sizes.operand)
        x_LL = jnp.where(differ_LL < block * numbers, _repeat(sizes, block, x_bL), _zero(x_bL))
        xa_bL = dot(x_bL, jnp.where(differ_LL >> level == 1, a_LL, 0))
        if 1 << level < block * numbers:
            x_bL = dot(eye_bL - xa_bL, x_LL)
        else:
            x_bL = _double(sizes, block, x_bL, dot(-xa_bL, x_LL).astype(sizes.operand))
            block *= 2
    return x_bL if sizes.operand == jnp.float32 else _newton(a_LL, x_bL, eye_LL)


def _newton(a_LL, x_LL, eye_LL):
    """X + X (I - (I + A) X), where (I + A) is the sum of two bfloat16 matrices."""
    dot = functools.partial(dot_general, jnp.dtype(jnp.bfloat16))
    x_LL = x_LL.astype(jnp.bfloat16)
    high_LL = truncate(a_LL)
    sum_LL = jnp.concatenate([eye_LL + high_LL, a_LL - high_LL], axis=2)
    return dot(x_LL, 2 * eye_LL - dot(sum_LL, jnp.concatenate([x_LL, x_LL], axis=1)))


def _block_rows(sizes: Sizes, block: int, x_LL):
    """Rows of the diagonal blocks of so many tokens, side by side: [., N * block, L]."""
    token_1L = jax.lax.broadcasted_iota(jnp.int32, (1, 1, sizes.micro), 2) & (sizes.chunk - 1)
    rows = []
    for first in range(0, sizes.micro, sizes.chunk):
        rows_bL = x_LL[:, first : first + block]
        for start in range(block, sizes.chunk, block):
            here = x_LL[:, first + start : first + start + block]
            rows_bL = jnp.where(token_1L // block == start // block, here, rows_bL)
        rows.append(rows_bL)
    return jnp.concatenate(rows, axis=1)


def _repeat(sizes: Sizes, block: int, x_bL):
    """Rows of a block as rows of every block: [., L, L]."""
    steps = [x_bL[:, j * block : (j + 1) * block] for j in range(sizes.steps)]
    return jnp.concatenate([x for x in steps for _ in range(sizes.chunk // block)], axis=1)


def _double(sizes: Sizes, block: int, x_bL, below_bL):
    """Rows of blocks twice as large, from those of the halves and those below the diagonal."""
    second = jax.lax.broadcasted_iota(jnp.int32, (1, block, sizes.micro), 2) & block != 0
    rows = []
    for j in range(sizes.steps):
        x, below = (y[:, j * block : (j + 1) * block] for y in (x_bL, below_bL))
        rows += [jnp.where(second, _zero(x), x), jnp.where(second, x, below)]
    return jnp.concatenate(rows, axis=1)


def number(sizes: Sizes, axis: int):
    """A number per micro-step along an axis of [1, L, L] that grows in the true order."""
    index = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.micro, sizes.micro), axis)
    token, step = index & (sizes.chunk - 1), index >> (sizes.chunk.bit_length() - 1)
    return (token << (sizes.steps - 1).bit_length()) + step


def _differ(sizes: Sizes):
    return number(sizes, 1) ^ number(sizes, 2)


def truncate(x):
    """The leading bits of a float32 that a bfloat16 holds, as a float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & -65536, jnp.float32)


def dot_general(operand, a, b, contract=(2, 1)):
    """Product per head, summed over axis contract[0] of a and contract[1] of b, in float32."""
    full = operand == jnp.float32
    return jax.lax.dot_general(
        *(a.astype(operand), b.astype(operand)),
        (((contract[0],), (contract[1],)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _zero(x):
    return jnp.zeros((), x.dtype)
