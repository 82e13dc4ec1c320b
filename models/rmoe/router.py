"""Routers: which experts a token goes to, with a memory that runs over the layers.

Dimensions: T tokens (rows and their tokens in one), D hidden, P router state, E experts, J chosen.

  x'_i = x_i W1_i + b1_i                  (a projector of each layer)
  s_i  = cell(x'_i, s_{i-1})              (one cell for all layers; s_0 = 0)
  logits_i = head_i(s_i)                  (a head of each layer)

with the layer i as the time of the recurrence: tokens know nothing of each other, and the memory
begins anew in every pass (Qiu et al. 2024, "Layerwise Recurrent Router for Mixture-of-Experts",
equations 1 to 5). Without a cell the head reads x_i, which is an ordinary router.

All of it computes in float32 or better, whatever the type of x.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype

Params = Mapping[str, jax.Array]

CELLS = {"none": 0, "rnn": 1, "gru": 3, "lstm": 4}  # gates
MEMORIES = ("full", "none", "detach")
HEADS = ("linear", "random", "mlp", "hyper", "xmoe", "xmoe_code", "cosine", "cosine_code")
TEMPERATURE = 0.3  # first value of the learned one; of the balance loss in the "code" forms
MIN_TEMPERATURE = 1e-4
XMOE_NORM = 1.5  # of the experts' embeddings in the "code" form

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """A router.

    Attributes:
      num_experts, experts_per_token: E and J.
      cell: "gru", "rnn", "lstm", or "none" for a router without memory.
      memory: "full"; "none": every layer begins with s = 0 (NP); or "detach": no gradient flows
        into the layers before.
      projector: x is projected to P for the cell; else the cell reads x.
      router_dim: P.
      head: "linear"; "random": linear, at its initial values for ever; "mlp": a layer of GELU
        between; "hyper": linear, generated from an embedding by a frozen network; "xmoe": cosine
        in a space of ``head_dim``, "cosine": in the hidden space, both with a learned temperature;
        "xmoe_code", "cosine_code": as public code has them, with only the experts' side normalised
        and no temperature except in the balance loss.
      head_dim: width inside the head: of mlp, hyper and xmoe.
      residual: factor on the logits of the layer before, added to this layer's (r-a); 0: none.
      residual_detach: no gradient flows through what is added.
      residual_cumulative: what is added has itself been added to.
      bias: of projector and linear head.
      normalise: the weights of the chosen experts sum to 1.
    """

    num_experts: int
    experts_per_token: int
    cell: str
    memory: str
    projector: bool
    router_dim: int
    head: str
    head_dim: int
    residual: float
    residual_detach: bool
    residual_cumulative: bool
    bias: bool
    normalise: bool

    def __post_init__(self):
        for name, allowed in (("cell", CELLS), ("memory", MEMORIES), ("head", HEADS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"router {name}={getattr(self, name)!r} must be one of {', '.join(allowed)}"
                )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) must be between 1 and num_experts"
                f" ({self.num_experts})"
            )
        if self.router_dim < 1 or self.head_dim < 1:
            raise ValueError(
                f"router_dim ({self.router_dim}) and head_dim ({self.head_dim}) must be positive"
            )
        if self.cell == "none" and self.memory != "full":
            raise ValueError(f"memory={self.memory!r} needs a cell; got cell='none'")
        if not self.residual and (self.residual_detach or self.residual_cumulative):
            raise ValueError("residual_detach and residual_cumulative need a residual other than 0")


class Carry(NamedTuple):
    """What a router hands to the next layer.

    Attributes:
      state: [T, P] state of the cell, or None without one.
      cell: [T, P] second state of an LSTM, or None.
      logits: [T, E] of this layer, for a residual, or None.
    """

    state: jax.Array | None
    cell: jax.Array | None
    logits: jax.Array | None


def start(c: RouterConfig, tokens: int, dtype) -> Carry:
    """Before the first layer: zeros. ``dtype`` is that of x."""
    wide = accumulation_dtype(dtype)
    zeros = lambda width: jnp.zeros((tokens, width), wide)
    return Carry(
        zeros(c.router_dim) if c.cell != "none" else None,
        zeros(c.router_dim) if c.cell == "lstm" else None,
        zeros(c.num_experts) if c.residual else None,
    )


def route(
    c: RouterConfig, shared: Params, own: Params, x_TD: jax.Array, carry: Carry
) -> tuple[jax.Array, Carry]:
    """One layer's logits [T, E], and what the next layer's router gets.

    Args:
      shared: parameters of the cell, the same in all layers; see :func:`parameters`.
      own: parameters of this layer.
      x_TD: what the experts see.
      carry: of the layer before, or :func:`start`.
    """
    wide = accumulation_dtype(x_TD.dtype)
    cast = lambda tree: {name: value.astype(wide) for name, value in tree.items()}
    shared, own, x_TD = cast(shared), cast(own), x_TD.astype(wide)
    if c.cell != "none":
        if c.projector:
            x_TD = _linear(x_TD, own["projector"], own.get("projector_bias"))
        x_TD, cell = _step(c, shared, x_TD, carry)
        carry = carry._replace(state=x_TD, cell=cell)
    logits_TE = _HEADS[c.head](c, own, x_TD)
    before_TE = carry.logits
    if before_TE is None:
        return logits_TE, carry
    if c.residual_detach:
        before_TE = jax.lax.stop_gradient(before_TE)
    summed_TE = logits_TE + c.residual * before_TE
    return summed_TE, carry._replace(logits=summed_TE if c.residual_cumulative else logits_TE)


def choose(
    c: RouterConfig, logits_TE: jax.Array, preference_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The J experts with the highest logits: index [T, J] int32, weight [T, J], score [T, J].

    The score is the probability among all experts; the weights are the scores, divided by their
    sum if the config says so. Of equal logits the lower index is chosen. A ``jax.checkpoint`` that
    saves the name "router_index" does not choose again in the backward, where rounding could
    choose otherwise.

    Args:
      preference_E: [E], added to the probabilities for the choice and for nothing else (Wang et
        al. 2024, "Auxiliary-Loss-Free Load Balancing"); None for none.
    """
    ranked_TE = jax.lax.stop_gradient(logits_TE)
    if preference_E is not None:
        ranked_TE = jax.nn.softmax(ranked_TE, axis=1) + preference_E.astype(ranked_TE.dtype)[None]
    _, index_TJ = jax.lax.top_k(ranked_TE, c.experts_per_token)
    index_TJ = checkpoint_name(index_TJ, "router_index")
    chosen_TJ = jnp.take_along_axis(logits_TE, index_TJ, axis=1)
    score_TJ = jnp.exp(chosen_TJ - jax.nn.logsumexp(logits_TE, axis=1, keepdims=True))
    weight_TJ = jax.nn.softmax(chosen_TJ, axis=1) if c.normalise else score_TJ
    return index_TJ, weight_TJ, score_TJ


def balance_temperature(c: RouterConfig) -> float:
    """What logits are divided by in the balance loss."""
    return TEMPERATURE if c.head.endswith("_code") else 1.0


class Parameter(NamedTuple):
    """What a parameter looks like.

    Attributes:
      shape: matrices are [in, out].
      inputs: width that its first values are scaled by.
    """

    shape: tuple[int, ...]
    inputs: int


def parameters(c: RouterConfig, hidden: int) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    """The shared parameters and those of a layer, by name.

    The cell's gates stand side by side: r, z, n of a GRU, i, f, g, o of an LSTM.
    """

    def linear(name: str, inputs: int, outputs: int, bias: bool = True):
        found = {name: Parameter((inputs, outputs), inputs)}
        return found | {f"{name}_bias": Parameter((outputs,), inputs)} if bias else found

    shared, own = {}, {}
    gates, p, width = CELLS[c.cell], c.router_dim, hidden
    if gates:
        inputs = p if c.projector else hidden
        for name, size in (("input", inputs), ("hidden", p)):
            shared[name] = Parameter((size, gates * p), p)
            shared[f"{name}_bias"] = Parameter((gates * p,), p)
        if c.projector:
            own |= linear("projector", hidden, p, c.bias)
        width = p
    if c.head in ("linear", "random"):
        return shared, own | linear("head", width, c.num_experts, c.bias)
    if c.head == "mlp":
        own |= linear("head_in", width, c.head_dim)
        return shared, own | linear("head", c.head_dim, c.num_experts)
    if c.head == "hyper":
        own["embedding"] = Parameter((1, width), 1)
        own |= linear("hyper_in", width, c.head_dim)
        return shared, own | linear("hyper_out", c.head_dim, c.num_experts * (width + 1))
    if c.head.startswith("xmoe"):
        own |= linear("reduction", width, c.head_dim, bias=False)
        width = c.head_dim
    own["embeddings"] = Parameter((c.num_experts, width), width)
    if not c.head.endswith("_code"):
        own["temperature"] = Parameter((), 1)
    return shared, own


def first_value(c: RouterConfig, name: str, spec: Parameter, key, dtype, std: float | None):
    """A parameter before training.

    Args:
      name, spec: of :func:`parameters`.
      std: matrices and the cell's biases are normal with it, other biases 0 (the large models);
        None: all are uniform within 1 / sqrt(inputs) (the small ones).
    """
    shape = spec.shape
    if name == "temperature":
        return jnp.full(shape, TEMPERATURE, dtype)
    if name == "embedding":
        return jax.random.normal(key, shape, dtype)
    if name == "embeddings":
        rows = jax.nn.initializers.orthogonal()(key, shape, dtype)
        norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
        return rows / norm * (XMOE_NORM if c.head == "xmoe_code" else 1)
    if std is None:
        bound = 1 / math.sqrt(spec.inputs)
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    if name.endswith("_bias") and name not in ("input_bias", "hidden_bias"):
        return jnp.zeros(shape, dtype)
    return std * jax.random.normal(key, shape, dtype)


def _step(c: RouterConfig, shared: Params, x_TP, carry: Carry):
    """The cell's new states: [T, P], and an LSTM's second or None."""
    state_TP: Any = carry.state
    cell_TP: Any = carry.cell
    if c.memory == "none":
        state_TP, cell_TP = jax.tree.map(jnp.zeros_like, (state_TP, cell_TP))
    elif c.memory == "detach":
        state_TP, cell_TP = jax.lax.stop_gradient((state_TP, cell_TP))
    gates = CELLS[c.cell]
    inside = jnp.split(_linear(x_TP, shared["input"], shared["input_bias"]), gates, axis=1)
    back = jnp.split(_linear(state_TP, shared["hidden"], shared["hidden_bias"]), gates, axis=1)
    if c.cell == "rnn":
        return jnp.tanh(inside[0] + back[0]), None
    if c.cell == "gru":
        r_TP, z_TP = (jax.nn.sigmoid(i + b) for i, b in zip(inside[:2], back[:2], strict=True))
        n_TP = jnp.tanh(inside[2] + r_TP * back[2])
        return (1 - z_TP) * n_TP + z_TP * state_TP, None
    i_TP, f_TP, g_TP, o_TP = (i + b for i, b in zip(inside, back, strict=True))
    cell_TP = jax.nn.sigmoid(f_TP) * cell_TP + jax.nn.sigmoid(i_TP) * jnp.tanh(g_TP)
    return jax.nn.sigmoid(o_TP) * jnp.tanh(cell_TP), cell_TP


def _linear(x_TD, kernel_DF, bias_F=None):
    y_TF = _matmul(x_TD, kernel_DF)
    return y_TF if bias_F is None else y_TF + bias_F[None]


def _linear_head(c, own, x_TD):
    return _linear(x_TD, own["head"], own.get("head_bias"))


def _random_head(c, own, x_TD):
    return _linear_head(c, jax.lax.stop_gradient(own), x_TD)


def _mlp_head(c, own, x_TD):
    hidden_TF = _linear(x_TD, own["head_in"], own["head_in_bias"])
    return _linear_head(c, own, jax.nn.gelu(hidden_TF, approximate=False))


def _hyper_head(c, own, x_TD):
    frozen = jax.lax.stop_gradient({n: v for n, v in own.items() if n != "embedding"})
    hidden_1F = jax.nn.relu(_linear(own["embedding"], frozen["hyper_in"], frozen["hyper_in_bias"]))
    made_1N = _linear(hidden_1F, frozen["hyper_out"], frozen["hyper_out_bias"])
    made_EN = made_1N.reshape(c.num_experts, x_TD.shape[1] + 1)
    return _linear(x_TD, made_EN[:, :-1].T, made_EN[:, -1])


def _xmoe_head(c, own, x_TD):
    return _cosine_head(c, own, _linear(x_TD, own["reduction"]))


def _cosine_head(c, own, x_TD):
    cosine_TE = _matmul(_normalised(x_TD), _normalised(own["embeddings"]).T)
    return cosine_TE / jnp.maximum(own["temperature"], MIN_TEMPERATURE)


def _xmoe_code_head(c, own, x_TD):
    # Public code sets the stored embeddings to a norm of 1.5 before it uses them, so that gradients
    # are those at that norm; here they begin at it, and drift from it as slowly as they turn.
    rows_ED = own["embeddings"]
    norm_E1 = jnp.linalg.norm(rows_ED, axis=1, keepdims=True)
    rows_ED = rows_ED + jax.lax.stop_gradient(rows_ED * (XMOE_NORM / norm_E1) - rows_ED)
    return _matmul(_linear(x_TD, own["reduction"]), _normalised(rows_ED).T)


def _cosine_code_head(c, own, x_TD):
    return _matmul(x_TD, _normalised(own["embeddings"]).T)


def _normalised(x: jax.Array, eps: float = 1e-4) -> jax.Array:
    """Rows of norm 1; shorter ones than ``eps`` are divided by it."""
    square = jnp.sum(x * x, axis=1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return x / jnp.maximum(jnp.where(square > 0, norm, 0), eps)


_HEADS: Mapping[str, Any] = {
    "linear": _linear_head,
    "random": _random_head,
    "mlp": _mlp_head,
    "hyper": _hyper_head,
    "xmoe": _xmoe_head,
    "xmoe_code": _xmoe_code_head,
    "cosine": _cosine_head,
    "cosine_code": _cosine_code_head,
}
