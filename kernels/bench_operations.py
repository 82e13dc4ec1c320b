"""The operations that are timed: what they are called with, and what they compute at least."""

from collections.abc import Callable, Collection, Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import (
    Experts,
    additive_scan,
    convolution_3x3,
    delta_product,
    dispatch,
    expert_mlp,
    short_convolution,
)
from .additive_scan import api as additive_api
from .convolution import api as convolution_api
from .delta_product import api as delta_api
from .short_convolution import api as short_api

Shape = tuple[int, ...]


class Operation(NamedTuple):
    """What is timed.

    Attributes:
      dimensions: of a shape.
      shapes: default of --shapes.
      function: (*arguments, implementation) -> (o, state).
      implementations: the names of those that this machine runs.
      inputs: (shape, gated) -> arguments.
      flops: shape -> FLOPs of the forward, by the definition.
      baseline: the implementation that all are compared with.
      counted: the compiler's count of FLOPs is one of the whole operation.
    """

    dimensions: str
    shapes: str
    function: Callable[..., Any]
    implementations: Callable[[], Collection[str]]
    inputs: Callable[[Shape, bool], tuple[Any, ...]]
    flops: Callable[[Shape], float]
    baseline: str = "reference"
    counted: bool = False


def _delta_inputs(shape: Shape, gated: bool):
    """Random q, k (unit length), v, beta in (0, 2), and log decays or None."""
    batch, tokens, heads, key_dim, value_dim, steps = shape
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key, *dims: jax.random.normal(key, (batch, tokens, *dims))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    q = unit(normal(keys[0], heads, key_dim))
    k = unit(normal(keys[1], steps, heads, key_dim))
    v = normal(keys[2], steps, heads, value_dim)
    beta = 2 * jax.nn.sigmoid(normal(keys[3], steps, heads))
    g = -0.1 * jax.nn.softplus(normal(keys[4], heads)) if gated else None
    return q, k, v, beta, g


def _delta_flops(shape: Shape) -> float:
    batch, tokens, heads, key_dim, value_dim, steps = shape
    return 4.0 * batch * tokens * heads * key_dim * value_dim * (steps + 1)


def _additive_inputs(shape: Shape, gated: bool):
    """Random q, k (logits) and v."""
    del gated
    batch, tokens, heads, key_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(0), 3)
    widths = (key_dim, key_dim, value_dim)
    dims = [(batch, tokens, heads, width) for width in widths]
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, dims, strict=True))


def _additive_flops(shape: Shape) -> float:
    batch, tokens, heads, key_dim, value_dim = shape
    return 5.0 * batch * tokens * heads * key_dim * value_dim


def _expert_inputs(shape: Shape, gated: bool):
    """Random tokens, different experts for each, weights that sum to 1, experts with biases."""
    del gated
    tokens, hidden, width, number, choices = shape
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda i, *dims: jax.random.normal(keys[i], dims)
    scores, index = jax.lax.top_k(normal(0, tokens, number), choices)
    experts = Experts(
        normal(1, number, hidden, width) / hidden**0.5,
        normal(2, number, width, hidden) / width**0.5,
        None,
        normal(3, number, width),
        normal(4, number, hidden),
    )
    return normal(5, tokens, hidden), index, jax.nn.softmax(scores), experts


def _expert_flops(shape: Shape) -> float:
    tokens, hidden, width, _, choices = shape
    return 4.0 * tokens * choices * hidden * width


def _convolution_inputs(shape: Shape, gated: bool):
    """Random images, and a kernel that keeps their size."""
    del gated
    *image, features = shape
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[1], (3, 3, image[-1], features))
    return jax.random.normal(keys[0], image), kernel / (9 * image[-1]) ** 0.5


def _convolution_flops(shape: Shape) -> float:
    return 18.0 * math.prod(shape)


def _convolution(*arguments, implementation: str):
    return convolution_3x3(*arguments, implementation=implementation), None


def _short_inputs(shape: Shape, gated: bool):
    """Random inputs and a kernel."""
    del gated
    *inputs, taps = shape
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[1], (taps, inputs[-1])) / taps**0.5
    return jax.random.normal(keys[0], inputs), kernel


def _short_flops(shape: Shape) -> float:
    return 2.0 * math.prod(shape)


def _short_convolution(x, kernel, *, implementation: str):
    y = short_convolution(x, kernel, activation="silu", implementation=implementation)
    return y, None


EXPERT_OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"implementation": "dense"},
    "ragged": {"implementation": "ragged"},
    "block 32": {"implementation": "block", "block_size": 32},
    "block 64": {"implementation": "block", "block_size": 64},
    "block 128": {"implementation": "block", "block_size": 128},
    "capacity 1.25": {"implementation": "capacity", "capacity_factor": 1.25},
    "gmm": {"implementation": "gmm"},
}


def _expert_names() -> list[str]:
    tpu = jax.default_backend() == "tpu"
    return [name for name in EXPERT_OPTIONS if tpu or name != "gmm"]


def _expert_mlp(*arguments, implementation: str):
    return expert_mlp(*arguments, **EXPERT_OPTIONS[implementation]), None


def _runnable(table: Mapping[str, dispatch.Implementation]) -> list[str]:
    """Without the kernels that take no float32: for these there is --suite gpu."""
    here = jax.default_backend()
    return [name for name, x in table.items() if here in x.platforms and name != "pallas_gpu"]


OPERATIONS = {
    "delta_product": Operation(
        "B,T,H,K,V,N",
        "4,2048,4,64,64,1;4,2048,4,64,64,2",
        delta_product,
        lambda: _runnable(delta_api.IMPLEMENTATIONS),
        _delta_inputs,
        _delta_flops,
    ),
    "additive_scan": Operation(
        "B,T,H,K,V",
        "4,2048,4,64,64",
        additive_scan,
        lambda: _runnable(additive_api.IMPLEMENTATIONS),
        _additive_inputs,
        _additive_flops,
    ),
    "convolution_3x3": Operation(
        "B,H,W,I,O",
        "8,32,32,96,96;8,16,16,192,192;8,8,8,192,192",
        _convolution,
        lambda: _runnable(convolution_api.IMPLEMENTATIONS),
        _convolution_inputs,
        _convolution_flops,
        baseline="xla",
    ),
    "short_convolution": Operation(
        "B,T,D,W",
        "4,1024,256,4;4,1024,512,4",
        _short_convolution,
        lambda: _runnable(short_api.IMPLEMENTATIONS),
        _short_inputs,
        _short_flops,
        baseline="xla",
    ),
    "expert_mlp": Operation(
        "T,D,F,E,J",
        "2048,352,352,16,2",
        _expert_mlp,
        _expert_names,
        _expert_inputs,
        _expert_flops,
        baseline="ragged",
        counted=True,
    ),
}
