"""The public function: argument checks, then dispatch."""

import math

import jax

from .. import dispatch
from . import native_cpu, xla

IMPLEMENTATIONS = {
    "native_cpu": dispatch.Implementation(
        native_cpu.short_convolution, native_cpu.supports, platforms=("cpu",), measured=True
    ),
    "xla": dispatch.Implementation(xla.short_convolution),
}
ACTIVATIONS = (None, "silu")


def short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    history: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y[b, t, d] = activation(sum_i kernel[i, d] x[b, t - W + 1 + i, d]), every channel alone.

    Of the inputs before the current token, those of another segment count as zeros. The channels D
    may be several dimensions: (H, K), or (N, H, K) for N steps, of H heads of width K.

    Args:
      x: [B, T, *D] inputs.
      kernel: [W, *D], of the same dtype; kernel[W - 1] weighs the current token.
      history: [B, W - 1, *D], the inputs before x (newest last) in its dtype, of the first token's
        segment; None for zeros.
      segment_ids: [B, T] integers, or None for one segment.
      activation: "silu", or None.
      implementation: "xla", "native_cpu", or None for the fastest here.

    Returns:
      [B, T, *D] in the arguments' dtype.

    Raises:
      ValueError: if shapes, dtypes or names do not fit, or the named implementation cannot run.
    """
    channels = x.shape[2:]
    if not 1 <= len(channels) <= 3 or kernel.shape[1:] != channels or kernel.shape[0] < 1:
        raise ValueError(
            "short_convolution: inputs [B, T, *D] and a kernel [W, *D] with one to three dimensions"
            f" of channels are wanted, got {x.shape} and {kernel.shape}"
        )
    before = (x.shape[0], kernel.shape[0] - 1, *channels)
    if history is not None and history.shape != before:
        raise ValueError(f"short_convolution: history must be {before}, not {history.shape}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(
            f"short_convolution: segment_ids must be {x.shape[:2]}, not {segment_ids.shape}"
        )
    for name, array in (("the kernel is", kernel), ("the history is", history)):
        if array is not None and array.dtype != x.dtype:
            raise ValueError(f"short_convolution: inputs are {x.dtype} but {name} {array.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"short_convolution: activation is {activation!r}, not one of {ACTIVATIONS}"
        )
    return dispatch.call(
        "short_convolution",
        IMPLEMENTATIONS,
        implementation,
        x,
        kernel,
        history,
        segment_ids,
        size=(max(1, x.shape[1]), max(1, math.prod(channels))),
        activation=activation,
    )
