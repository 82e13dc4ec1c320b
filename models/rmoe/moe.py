"""The mixture of experts of one layer: its router, its experts, and what is kept of both.

Dimensions: T tokens (rows and their tokens in one), D hidden, E experts, F expert width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels import Experts, expert_mlp, expert_mlp_sharded
from ..layers import parameter, uniform
from . import losses, router
from .config import MoEConfig, RMoEConfig

# Collections that a model fills if they are mutable, a value for each layer.
STATISTICS = "statistics"  # losses.Statistics
ROUTING = "routing"  # logits [T, E] and index [T, J], for analyses
# Collection of the state that is not optimised: see ``MoEConfig.router_balance_rate``.
BALANCE = "balance"


class RouterCell(nn.Module):
    """Owns the parameters of the cell that all layers share; returns them."""

    config: MoEConfig

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        c = self.config
        shared, _ = router.parameters(c.router, c.hidden_size)
        return _parameters(self, c, shared)


class MoE(nn.Module):
    """Router and experts of a layer: gated ones in pre-norm models, with biases and ReLU else."""

    config: MoEConfig

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        shared: dict[str, jax.Array],
        carry: router.Carry,
        mask_T: jax.Array | None = None,
        keep_TJF: jax.Array | None = None,
    ) -> tuple[jax.Array, router.Carry]:
        """Experts' output [T, D], and the carry for the next layer's router.

        Args:
          x_TD: tokens.
          shared: of ``RouterCell``.
          carry: of the layer before.
          mask_T: [T] bool, True = a token. The others go to no expert and count in no statistic.
          keep_TJF: factors on the experts' hidden activations, or None.
        """
        c, hidden = self.config, x_TD.shape[-1]
        _, specs = router.parameters(c.router, hidden)
        own = _parameters(self, c, specs)
        logits_TE, carry = router.route(c.router, shared, own, x_TD, carry)
        bias_E, chosen_E = self._balance() if c.router_balance_rate else (None, None)
        preference_E = None if bias_E is None else bias_E.value
        index_TJ, weight_TJ, score_TJ = router.choose(c.router, logits_TE, preference_E)
        temperature = router.balance_temperature(c.router)
        found = losses.statistics(logits_TE, index_TJ, mask_T, temperature)
        if (
            chosen_E is not None
            and self.is_mutable_collection(BALANCE)
            and not self.is_initializing()
        ):
            chosen_E.value = chosen_E.value + found.chosen.astype(jnp.float32)
        self.sow(STATISTICS, "sums", found)
        self.sow(ROUTING, "logits", logits_TE)
        self.sow(ROUTING, "index", index_TJ)
        y_TD = _expert_mlp()(
            x_TD.astype(c.dtype),
            index_TJ,
            weight_TJ,
            self._experts(hidden),
            capacity_factor=c.capacity_factor or None,
            policy=c.capacity_policy,
            score=score_TJ,
            mask=mask_T,
            keep=keep_TJF,
            implementation=None if c.implementation == "auto" else c.implementation,
        )
        return y_TD, carry

    def _balance(self):
        """Variables: what is added to the experts' probabilities, and how often each was chosen."""
        zeros = lambda: jnp.zeros(self.config.num_experts, jnp.float32)
        return self.variable(BALANCE, "bias", zeros), self.variable(BALANCE, "chosen", zeros)

    def _experts(self, hidden: int) -> Experts:
        c, number, width = self.config, self.config.num_experts, self.config.intermediate_size
        gated = isinstance(c, RMoEConfig)
        if gated:
            init: Any = nn.initializers.normal(c.initializer_range)
        else:  # as public code initialises them: by both dimensions together
            init = uniform(hidden * width)

        def make(name: str, axes: tuple[str, ...], *shape: int, init=init) -> jax.Array:
            return parameter(self, name, init, ("experts", *axes), (number, *shape), c.param_dtype)

        up = make("up", ("embed", "mlp"), hidden, width)
        down = make("down", ("mlp", "embed"), width, hidden)
        if gated:
            return Experts(up, down, make("gate", ("embed", "mlp"), hidden, width))
        zeros = nn.initializers.zeros
        biases = (
            make("up_bias", ("mlp",), width, init=zeros),
            make("down_bias", ("embed",), hidden, init=zeros),
        )
        return Experts(up, down, None, *biases)


def _expert_mlp() -> Any:
    """The experts' function for the mesh that surrounds the model, if one does.

    The training step and the evaluation trace the model under their mesh; if it divides the
    tokens, each device sorts its own, and they travel if it divides the experts. Everything else
    (parameters, sampling, analyses) is outside of a mesh, where any number of tokens goes through
    all experts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape.get(axis, 1) == 1 for axis in ("data", "fsdp", "expert")):
        return expert_mlp
    return functools.partial(expert_mlp_sharded, mesh=mesh)


def settle(c: MoEConfig, balance: Any) -> Any:
    """The collection ``BALANCE`` after an update; see ``MoEConfig.router_balance_rate``.

    Experts that were chosen less often than the mean become likelier, the others less likely.
    """

    def layer(node):
        if "chosen" not in node:
            return {name: layer(child) for name, child in node.items()}
        chosen = node["chosen"]
        sign = jnp.sign(jnp.mean(chosen, axis=-1, keepdims=True) - chosen)
        bias = node["bias"] + c.router_balance_rate * sign
        return {"bias": bias, "chosen": jnp.zeros_like(chosen)}

    return layer(balance)


def scanned(
    block: type[nn.Module],
    c: MoEConfig,
    layers: int,
    axes: tuple[int | None, ...],
    out_axis: int = 0,
) -> Any:
    """``block`` as a scan over so many layers; parameters and routing get a first axis of them.

    The backward recomputes a layer if the config says so, but does not choose experts again, nor
    which tokens find a place.

    Args:
      block: called with a carry and other arguments; returns the carry and an output.
      axes: of those arguments: where layers lie in one that differs from layer to layer, None
        for the others.
      out_axis: of the output.
    """
    stack: Any = block
    if c.remat:
        policy = jax.checkpoint_policies.save_only_these_names("router_index", "expert_rows")
        stack = nn.remat(block, policy=policy, prevent_cse=False)
    in_axes: Any = tuple(nn.broadcast if axis is None else axis for axis in axes)
    return nn.scan(
        stack,
        variable_axes={"params": 0, STATISTICS: 0, ROUTING: 0, BALANCE: 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        out_axes=out_axis,
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _parameters(
    module: nn.Module, c: MoEConfig, specs: dict[str, router.Parameter]
) -> dict[str, jax.Array]:
    """The parameters that ``router.parameters`` names, as those of a module."""
    std = c.initializer_range if isinstance(c, RMoEConfig) else None

    def make(name: str, spec: router.Parameter) -> jax.Array:
        def init(key, shape, dtype) -> Any:
            del shape
            return router.first_value(c.router, name, spec, key, jnp.dtype(dtype), std)

        axes = ("router",) * len(spec.shape)
        return parameter(module, f"router_{name}", init, axes, spec.shape, c.param_dtype)

    return {name: make(name, spec) for name, spec in specs.items()}
