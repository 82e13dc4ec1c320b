"""MD-TPE: a Toeplitz product along every axis of a grid, summed (Qin et al. 2024, LightNet).

Dimensions: n tokens along the axis, C channels, E exponentials per channel.

  y_n = sum_{m <= n} t_{n-m} x_m,     t_i = sum_e b_e exp(i * log_decay_e)       per channel

Bidirectional products add coefficients of their own for m > n. The three forms agree: ``dense``
multiplies by the n x n matrix, for short axes; ``fft`` is a linear convolution by zero-padded
transforms; ``recurrence`` carries E numbers per channel from token to token, works in time and
memory linear in n, and continues from a state (causal, one axis).
"""

import jax
import jax.numpy as jnp

FORMS = ("dense", "fft", "recurrence")
DENSE = 128  # longest axis that takes the dense form by default


def toeplitz(
    x: jax.Array,
    b_CE: jax.Array,
    log_decay_CE: jax.Array,
    *,
    axis: int = 1,
    backward: tuple[jax.Array, jax.Array] | None = None,
    form: str | None = None,
) -> jax.Array:
    """The product along one axis.

    Args:
      x: [B, ..., C] with the axis among the dots.
      b_CE, log_decay_CE: [C, E], or [1, E] decays for all channels; log decays are <= 0.
      axis: of x.
      backward: (b, log_decay) of the tokens after n; None for a causal product. Lag 0 belongs to
        the forward coefficients alone.
      form: one of ``FORMS``; None takes dense for short axes and the recurrence for long ones.

    Returns:
      y, of x's shape and dtype.

    Raises:
      ValueError: for an unknown form.
    """
    form = form or ("dense" if x.shape[axis] <= DENSE else "recurrence")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}")
    x_nC = jnp.moveaxis(x, axis, -2)
    if form == "recurrence":
        y_nC, _ = recurrence(x_nC, b_CE, log_decay_CE)
        if backward is not None:
            b, log_decay = backward
            flipped, _ = recurrence(jnp.flip(x_nC, -2), b, log_decay)
            now_C = jnp.expand_dims(jnp.sum(b, axis=-1), tuple(range(x_nC.ndim - 1)))
            y_nC = y_nC + jnp.flip(flipped, -2) - now_C * x_nC
    else:
        n = x_nC.shape[-2]
        t_nC = coefficients(b_CE, log_decay_CE, n)
        t_back_nC = jnp.zeros_like(t_nC) if backward is None else coefficients(*backward, n)
        y_nC = (_dense if form == "dense" else _fft)(x_nC, t_nC, t_back_nC)
    return jnp.moveaxis(y_nC, -2, axis).astype(x.dtype)


def coefficients(b_CE: jax.Array, log_decay_CE: jax.Array, n: int) -> jax.Array:
    """t_i for i = 0 .. n-1: [n, C]."""
    lag_n = jnp.arange(n).astype(log_decay_CE.dtype)
    power_nCE = jnp.exp(lag_n[:, None, None] * log_decay_CE[None])
    return jnp.sum(b_CE[None] * power_nCE, axis=-1)


def recurrence(x_nC, b_CE, log_decay_CE, state_CE=None) -> tuple[jax.Array, jax.Array]:
    """Causal product token by token; x [..., n, C], state [..., C, E] or None for zeros.

    Returns:
      y [..., n, C], and the state after the last token.
    """
    if state_CE is None:
        state_CE = jnp.zeros((*x_nC.shape[:-2], *b_CE.shape), x_nC.dtype)
    lead = tuple(range(x_nC.ndim - 2))
    decay_CE = jnp.expand_dims(jnp.exp(log_decay_CE), lead)
    read_CE = jnp.expand_dims(b_CE, lead)

    def token(state_CE, x_C):
        state_CE = decay_CE * state_CE + x_C[..., None]
        return state_CE, jnp.sum(read_CE * state_CE, axis=-1)

    state_CE, y = jax.lax.scan(token, state_CE, jnp.moveaxis(x_nC, -2, 0))
    return jnp.moveaxis(y, 0, -2), state_CE


def _dense(x_nC, t_nC, t_back_nC):
    lag_nn = jnp.arange(x_nC.shape[-2])[:, None] - jnp.arange(x_nC.shape[-2])[None]
    past_nnC = jnp.where((lag_nn >= 0)[..., None], t_nC[jnp.abs(lag_nn)], 0)
    future_nnC = jnp.where((lag_nn < 0)[..., None], t_back_nC[jnp.abs(lag_nn)], 0)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("nmc,...mc->...nc", past_nnC + future_nnC, x_nC, precision=highest)


def _fft(x_nC, t_nC, t_back_nC):
    n = x_nC.shape[-2]
    wrapped = jnp.concatenate([t_nC, jnp.zeros_like(t_nC[:1]), jnp.flip(t_back_nC[1:], 0)])
    transform = lambda x: jnp.fft.rfft(x, 2 * n, axis=-2)
    product = transform(x_nC) * jnp.expand_dims(transform(wrapped), tuple(range(x_nC.ndim - 2)))
    return jnp.fft.irfft(product, 2 * n, axis=-2)[..., :n, :]
