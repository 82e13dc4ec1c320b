"""The flows' reference values: their files, the tiny network in them, and images channels last.

The network is v = W2 tanh(W1 x + wt tau + b1) + b2 on images flattened channels first.
"""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "rectflow"


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def part(file, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): x for key, x in file.items() if key.startswith(prefix)}


def last(x):
    """[..., C, H, W] -> [..., H, W, C]."""
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def first(x):
    """[..., H, W, C] -> [..., C, H, W]."""
    return jnp.moveaxis(jnp.asarray(x), -1, -3)


def kernel(file):
    """The stand-in distance's kernel [O, C, 3, 3] as [3, 3, C, O]."""
    return file["percep_K"].transpose(2, 3, 1, 0)


def apply(params, x_BHWC, tau_B):
    """The network of a file: W1, wt, b1, W2, b2."""
    x_BD = first(x_BHWC).reshape(len(x_BHWC), -1)
    time_BF = tau_B[:, None] * params["wt"][None]
    hidden_BF = jnp.tanh(x_BD @ params["W1"].T + time_BF + params["b1"][None])
    v_BD = hidden_BF @ params["W2"].T + params["b2"][None]
    return last(v_BD.reshape(first(x_BHWC).shape))
