"""MD-TPE: a Toeplitz product along every axis of a grid, summed (Qin et al. 2024, LightNet).

Dimensions: n tokens along the axis, C channels, E exponentials per channel.

  y_n = sum_{m <= n} t_{n-m} x_m,     t_i = sum_e b_e exp(i * log_decay_e)       per channel

Bidirectional products add coefficients of their own for m > n. The three forms agree: ``dense``
multiplies by the n x n matrix, for short axes; ``fft`` is a linear convolution by zero-padded
transforms; ``recurrence`` carries E numbers per channel from token to token, works in time and
memory linear in n, and continues from a state (causal, one axis).

The paper's joint product over all axes at once, with a coefficient for every offset on the grid, is
not here: no published layer has it.

The layer has one exponential per head and axis, as in the author's later code: the product goes
through an RMSNorm and a projection, and the sum over the axes replaces the embedded tokens.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ...kernels.per_device import by_rows
from ..layers import Dense, DType, Initializer, RMSNorm, parameter

FORMS = ("dense", "fft", "recurrence")
DENSE = 128  # longest axis that takes the dense form by default
NORM_EPS = 1e-5  # added to the sum of squares, not to their mean


class MDTPE(nn.Module):
    """Positions for embedded tokens on a grid.

    Attributes:
      axes: of the grid.
      num_heads: groups of consecutive channels that share a decay.
      bidirectional: tokens also see those behind them, with a decay and gain of their own.
      share_axes: one set of parameters for all axes.
      kernel_init, dtype, param_dtype: of the projection; dtype of the output.
    """

    axes: int
    num_heads: int
    bidirectional: bool
    share_axes: bool
    kernel_init: Initializer
    dtype: DType
    param_dtype: DType

    @nn.compact
    def __call__(self, x: jax.Array, *, mask=None, segment_ids=None, state=None):
        """Places tokens.

        Args:
          x: [B, n_1, ..., n_axes, C].
          mask: [B, n_1, ..., n_axes] bool, True = a token; the others are not seen.
          segment_ids: [B, n] integers, causal on one axis: tokens see their segment alone.
          state: [B, C], causal on one axis: what earlier tokens left, or None.

        Returns:
          y, of x's shape in ``dtype``, and the state after the last token [B, C] (None unless
          causal on one axis).

        Raises:
          ValueError: if the grid has another number of axes, heads do not divide C, or there are
            segments or a state where the product is not causal on one axis.
        """
        if x.ndim != self.axes + 2:
            raise ValueError(f"MDTPE takes [B, {self.axes} axes, C]; got shape {x.shape}")
        if x.shape[-1] % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {x.shape[-1]} channels")
        names = [f"axis_{0 if self.share_axes else s}" for s in range(self.axes)]
        settings = (self.num_heads, self.bidirectional, self.kernel_init)
        layers = {n: _Axis(*settings, self.dtype, self.param_dtype, name=n) for n in set(names)}
        sequence = self.axes == 1 and not self.bidirectional
        if not sequence and (segment_ids is not None or state is not None):
            raise ValueError("segments and states are for a causal product along one axis")
        if sequence:
            return layers[names[0]](x, 1, (mask, segment_ids, state))
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        y = jnp.zeros(x.shape, self.dtype)
        for s, name in enumerate(names):
            y = y + layers[name](x, 1 + s, None)[0]
        return y, None


class _Axis(nn.Module):
    num_heads: int
    bidirectional: bool
    kernel_init: Initializer
    dtype: DType
    param_dtype: DType

    @nn.compact
    def __call__(self, x, axis: int, sequence):
        """``sequence``: None, or (mask, segment_ids, state) of a causal product."""
        x, channels = by_rows(x), x.shape[-1]
        own, state = self._exponential("", channels), None
        if sequence is None:
            backward = self._exponential("back_", channels) if self.bidirectional else None
            core = toeplitz(x, *own, axis=axis, backward=backward)
        else:
            core, state = _sequence(x, *own, *sequence)
        eps = NORM_EPS / channels
        core = RMSNorm(eps, "heads", self.dtype, self.param_dtype, name="norm")(core)
        axes = ("heads", "embed")
        project = Dense(
            channels, axes, self.kernel_init, self.dtype, self.param_dtype, name="o_proj"
        )
        return project(core), state

    def _exponential(self, prefix: str, channels: int):
        """b and log decay, [C, 1] each: the gain <q, k> and the decay of a channel's head."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        own = lambda name, init, size: parameter(
            self, prefix + name, init, ("heads",), (size,), self.param_dtype
        )
        q_C, k_C = own("q", ones, channels), own("k", ones, channels)
        decay_H = own("log_decay", zeros, self.num_heads)
        gain_H = jnp.sum((q_C * k_C).reshape(self.num_heads, -1), axis=-1)
        spread = lambda x_H: jnp.repeat(x_H, channels // self.num_heads)[:, None]
        return spread(gain_H), spread(nn.log_sigmoid(decay_H))


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
    wide = accumulation_dtype(x.dtype)
    x_nC = jnp.moveaxis(x, axis, -2).astype(wide)
    (b_CE, log_decay_CE), backward = jax.tree.map(
        lambda c: c.astype(wide), ((b_CE, log_decay_CE), backward)
    )
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


def _sequence(x_BTC, b_C1, log_decay_C1, mask_BT, segments_BT, state_BC):
    """Causal product along T with one exponential per channel, and the state after it [B, C].

    A parallel scan, as decays may differ from token to token: 1 where there is no token, 0 where
    a segment begins.
    """
    wide = accumulation_dtype(x_BTC.dtype)
    h_BTC = x_BTC.astype(wide)
    decay_BTC = jnp.broadcast_to(jnp.exp(log_decay_C1.astype(wide))[None, None, :, 0], h_BTC.shape)
    if mask_BT is not None:
        h_BTC = jnp.where(mask_BT[..., None], h_BTC, 0)
        decay_BTC = jnp.where(mask_BT[..., None], decay_BTC, 1)
    if segments_BT is not None:
        begins_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
        begins_BT = jnp.pad(begins_BT, ((0, 0), (1, 0)))
        decay_BTC = jnp.where(begins_BT[..., None], 0, decay_BTC)
    if state_BC is not None:
        h_BTC = h_BTC.at[:, 0].add(decay_BTC[:, 0] * state_BC.astype(wide))
    join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    _, h_BTC = jax.lax.associative_scan(join, (decay_BTC, h_BTC), axis=1)
    y_BTC = b_C1.astype(wide)[None, None, :, 0] * h_BTC
    return y_BTC.astype(x_BTC.dtype), h_BTC[:, -1]


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
