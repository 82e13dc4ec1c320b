"""What the GPU benchmark times: our implementations, and other packages' on the same inputs.

  fla   flash-linear-attention's kernels in triton (torch): gated delta rule for N = 1, gated
        DeltaProduct for N > 1, gated linear attention for the additive scan
  jla   jax-linear-attention's kernels in Mosaic GPU, the same three

Arrays are bfloat16, log decays float32. The additive scan becomes gated linear attention with keys
exp(k - z) and log decays z_{t-1} - z_t, computed before anything is timed and without gradients
through them: in the peers' favour.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import additive_scan, delta_product

OPERATIONS = {"delta_product": delta_product, "additive_scan": additive_scan}
PEERS = ("fla", "jla")

Arrays = dict[str, jax.Array]


class Entry(NamedTuple):
    """An implementation.

    Attributes:
      prepare: (arguments of our function by name, do [B, T, H, V]) -> inputs of the two below.
      forward: inputs -> o; it need not have been computed yet.
      both: inputs -> o, and the gradients of sum(o do) in all arguments.
      wait: returns when such a result has been computed.
      numpy: o -> the same, float32.
      median: milliseconds of a call by the package's own timer; None without one.
      compile: ("forward" or not, inputs, pool) compiles in the pool; the call after it waits for
        the program. None for what is compiled by its first call. Its result gives the seconds.
    """

    prepare: Callable[[Arrays, jax.Array], Any]
    forward: Callable[[Any], Any]
    both: Callable[[Any], Any]
    wait: Callable[[Any], Any]
    numpy: Callable[[Any], np.ndarray]
    median: Callable[[Callable[[], Any]], float] | None = None
    compile: Callable[[bool, Any, Executor], Future] | None = None


@functools.partial(jax.jit, static_argnums=(0, 1))
def inputs(operation: str, shape: tuple[int, ...], seed: int) -> tuple[Arrays, jax.Array]:
    """Arguments by name, and do. Shapes are those of ``bench.py``.

    delta_product: q, k of length 1, v normal, beta in (0, 2), g = -0.1 softplus of a normal.
    additive_scan: all normal.
    """
    batch, tokens, heads, key_dim, value_dim, *steps = shape
    keys = jax.random.split(jax.random.key(seed), 6)
    normal = lambda i, *dims: jax.random.normal(keys[i], (batch, tokens, *dims))
    q, k = normal(0, heads, key_dim), normal(1, *steps, heads, key_dim)
    arrays = {"v": normal(2, *steps, heads, value_dim)}
    if operation == "delta_product":
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        arrays["beta"] = 2 * jax.nn.sigmoid(normal(3, *steps, heads))
    arrays = {"q": q, "k": k, **arrays}
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    if operation == "delta_product":
        arrays["g"] = -0.1 * jax.nn.softplus(normal(4, heads))
    return arrays, normal(5, heads, value_dim).astype(jnp.bfloat16)


def entry(name: str, operation: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a peer, or of one of our implementations.

    Raises:
      ImportError: if the peer is not installed.
    """
    if name == "fla":
        return fla(operation, shape)
    if name == "jla":
        return jla(operation, shape)
    function = functools.partial(OPERATIONS[operation], implementation=name)
    return _of_jax(lambda arrays: function(**arrays)[0], lambda arrays: arrays)


def jla(operation: str, shape: tuple[int, ...]) -> Entry:
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

    if operation == "additive_scan":
        kind = "gla"
    else:
        kind = "gated_deltanet" if shape[-1] == 1 else "gated_deltaproduct"
    forward = lambda arrays: linear_attention(kind, impl="mosaic_gpu", **arrays)[0]
    return _of_jax(forward, functools.partial(published, operation))


def _of_jax(forward: Callable[[Arrays], jax.Array], arrange: Callable[[Arrays], Arrays]) -> Entry:
    def both(arrays, do):
        o, pull = jax.vjp(forward, arrays)
        return o, pull(do)

    programs: dict[bool, Future] = {}

    def compiled(alone: bool, inputs, pool: Executor) -> Future:
        start = time.perf_counter()
        function, arguments = (forward, inputs[:1]) if alone else (both, inputs)
        lowered = jax.jit(function).lower(*arguments)
        lowering = time.perf_counter() - start

        def finish():
            start = time.perf_counter()
            return lowered.compile(), lowering + time.perf_counter() - start

        programs[alone] = pool.submit(finish)
        return programs[alone]

    return Entry(
        lambda arrays, do: jax.block_until_ready((arrange(arrays), do)),
        lambda inputs: programs[True].result()[0](inputs[0]),
        lambda inputs: programs[False].result()[0](*inputs),
        jax.block_until_ready,
        lambda o: np.asarray(o.astype(jnp.float32)),
        compile=compiled,
    )


def fla(operation: str, shape: tuple[int, ...]) -> Entry:
    import torch  # pyright: ignore[reportMissingImports]

    if operation == "additive_scan":
        from fla.ops.gla import chunk_gla as function  # pyright: ignore[reportMissingImports]
    elif shape[-1] == 1:
        from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
            chunk_gated_delta_rule as function,
        )
    else:
        from fla.ops.gated_delta_product import (  # pyright: ignore[reportMissingImports]
            chunk_gated_delta_product,
        )

        function = functools.partial(chunk_gated_delta_product, num_householder=shape[-1])
    return of_torch(function, operation, "cuda" if torch.cuda.is_available() else "cpu")


def of_torch(function: Callable[..., Any], operation: str, device: str) -> Entry:
    """``function``: (q, k, v, g, [beta]) by name, tensors on ``device`` -> (o, ...)."""
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(x: jax.Array):
        array = np.array(x)  # a copy: that of jax cannot be written to
        if x.dtype != jnp.bfloat16:
            return torch.from_numpy(array).to(device)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)

    def prepare(arrays, do):
        tensors = {name: tensor(x) for name, x in published(operation, arrays).items()}
        return {name: x.requires_grad_() for name, x in tensors.items()}, tensor(do)

    def forward(inputs):
        with torch.no_grad():
            return function(**inputs[0])[0]

    def both(inputs):
        tensors, do = inputs
        o = function(**tensors)[0]
        return o, torch.autograd.grad(o, list(tensors.values()), do)

    def wait(result):
        del result
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        from triton.testing import do_bench  # pyright: ignore[reportMissingImports]
    except ImportError:
        median = None
    else:
        median = functools.partial(do_bench, return_mode="median")
    return Entry(prepare, forward, both, wait, lambda o: o.float().cpu().numpy(), median)


def published(operation: str, arrays: Arrays) -> Arrays:
    """The arguments of our function as those of both peers: N steps become N tokens."""
    if operation == "additive_scan":
        return _as_gla(arrays)
    q, g = arrays["q"], arrays["g"]
    long = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    return {"q": q, "g": g} | {name: long(arrays[name]) for name in ("k", "v", "beta")}


@jax.jit
def _as_gla(arrays: Arrays) -> Arrays:
    k = arrays["k"].astype(jnp.float32)
    z = jax.lax.cumlogsumexp(k, axis=1)
    g = jnp.pad(z[:, :-1] - z[:, 1:], ((0, 0), (1, 0), (0, 0), (0, 0)))
    return {"q": arrays["q"], "k": jnp.exp(k - z).astype(jnp.bfloat16), "v": arrays["v"], "g": g}
