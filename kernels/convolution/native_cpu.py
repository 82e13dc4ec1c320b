"""The 3 x 3 convolution on CPU in C++ (``native_cpu.cc``).

Both functions there are linear in either argument, and their derivatives are the two again: as
primitives of JAX they have derivatives of either mode and any order.
"""

import pathlib

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from .. import native
from ..dtypes import accumulation_dtype
from ..per_device import not_divided, per_device

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
INPUTS, OUTPUT = ("BYXI", "YXIH"), "BYXH"  # on a mesh: rows and outputs are divided


def supports(x: jax.Array, kernel: jax.Array) -> str | None:
    """Why these arguments do not fit, or None."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"it takes floating-point numbers, not {x.dtype}"
    return why_not() or not_divided(INPUTS, (x, kernel))


def why_not() -> str | None:
    """Why these functions cannot run on this machine, or None."""
    return native.why_not(SOURCE, ("convolution", "convolution_kernel"))


def convolution_3x3(x_BYXI: jax.Array, kernel_33IO: jax.Array) -> jax.Array:
    """[B, Y, X, I] and [3, 3, I, O] -> [B, Y, X, O], as ``xla.py``; in float32 or better."""
    wide = accumulation_dtype(x_BYXI.dtype)
    run = per_device(_convolution, INPUTS, OUTPUT)
    return run(x_BYXI.astype(wide), kernel_33IO.astype(wide)).astype(x_BYXI.dtype)


def _convolution(x, kernel, turned: bool = False):
    """The convolution, or ``turned`` its transpose: [B, Y, X, O] -> [B, Y, X, I]."""
    return convolution_p.bind(*native.vary_alike(x, kernel), turned=turned)


def _kernel(x, y):
    """[B, Y, X, I] and [B, Y, X, O] -> [3, 3, I, O], the gradient of <y, convolution>."""
    return kernel_p.bind(*native.vary_alike(x, y))


def _primitive(name: str, options: tuple[str, ...], run, shape, first, second) -> Primitive:
    """A function of two arrays that is linear in each.

    Args:
      name: its own.
      options: names of arguments that are no arrays.
      run: what computes it, and ``shape`` the shape of that.
      first, second: gradients of <cotangent, result> in each argument, of the cotangent and both.
    """

    def abstract(a, b, **options):
        return a.update(shape=shape(a, b, **options), weak_type=False)

    def batched(arguments, at, **options):
        size = next(a.shape[i] for a, i in zip(arguments, at, strict=True) if i is not None)
        whole = [batching.bdim_at_front(a, i, size) for a, i in zip(arguments, at, strict=True)]
        return jax.lax.map(lambda pair: primitive.bind(*pair, **options), whole), 0

    primitive = Primitive(name)
    primitive.def_impl(jax.jit(run, static_argnames=options))
    primitive.def_abstract_eval(abstract)
    lowered = mlir.lower_fun(run, multiple_results=False)
    mlir.register_lowering(primitive, lowered, platform="cpu")
    batching.primitive_batchers[primitive] = batched
    ad.defbilinear(primitive, first, second)
    return primitive


def _convolution_shape(x, kernel, *, turned: bool):
    return (*x.shape[:3], kernel.shape[2 if turned else 3])


def _run_convolution(x, kernel, *, turned: bool):
    output = jax.ShapeDtypeStruct(_convolution_shape(x, kernel, turned=turned), x.dtype)
    return native.call("convolution", [output], (x, kernel), turned=turned)[0]


def _kernel_shape(x, y):
    return (3, 3, x.shape[3], y.shape[3])


def _run_kernel(x, y):
    output = jax.ShapeDtypeStruct(_kernel_shape(x, y), x.dtype)
    return native.call("convolution_kernel", [output], (x, y))[0]


convolution_p = _primitive(
    "convolution_3x3",
    ("turned",),
    _run_convolution,
    _convolution_shape,
    lambda dy, x, kernel, turned: _convolution(dy, kernel, not turned),
    lambda dy, x, kernel, turned: _kernel(dy, x) if turned else _kernel(x, dy),
)
kernel_p = _primitive(
    "convolution_3x3_kernel",
    (),
    _run_kernel,
    _kernel_shape,
    lambda dkernel, x, y: _convolution(y, dkernel, turned=True),
    lambda dkernel, x, y: _convolution(x, dkernel),
)
