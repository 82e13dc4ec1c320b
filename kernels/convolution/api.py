"""The public function: argument checks, then dispatch."""

import jax

from .. import dispatch
from . import native_cpu, xla

IMPLEMENTATIONS = {
    "native_cpu": dispatch.Implementation(
        native_cpu.convolution_3x3, native_cpu.supports, platforms=("cpu",), measured=True
    ),
    "xla": dispatch.Implementation(xla.convolution_3x3),
}


def convolution_3x3(
    x: jax.Array, kernel: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """y[b, h, w, o] = sum_ijc x[b, h + i - 1, w + j - 1, c] kernel[i, j, c, o], zeros around x.

    Args:
      x: [B, H, W, I] images.
      kernel: [3, 3, I, O], of the same dtype.
      implementation: "xla", "native_cpu", or None for the fastest here.

    Returns:
      [B, H, W, O] in the arguments' dtype.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the named implementation cannot run.
    """
    if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[:3] != (3, 3, x.shape[-1]):
        raise ValueError(
            "convolution_3x3: images [B, H, W, I] and a kernel [3, 3, I, O] are wanted, got"
            f" {x.shape} and {kernel.shape}"
        )
    if x.dtype != kernel.dtype:
        raise ValueError(f"convolution_3x3: images are {x.dtype} but the kernel is {kernel.dtype}")
    size = (max(1, x.shape[1] * x.shape[2]), max(1, x.shape[3]))
    return dispatch.call("convolution_3x3", IMPLEMENTATIONS, implementation, x, kernel, size=size)
