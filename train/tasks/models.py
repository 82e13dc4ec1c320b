"""The models that a task can train: one entry per family, built from the config."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...models import delta_product, lightnet, radd, rmoe
from ..config import Config, ConfigError, build


class CausalLM(NamedTuple):
    """A language model that predicts the next token.

    Attributes:
      config: of the model.
      module: (ids [B, T], mask, segment_ids, cache, last_only) -> (logits [B, T, S], cache).
      empty_cache: (batch size, tokens that it must have room for) -> cache before the first token.
      has_cache: whether there is one; else the model cannot go on from a state.
      states: cache -> the layers' matrices [layers, B, H, K, V]; None for models that have none.
      carries: the cache has the same size whatever was read, and rows as the first axis of all
        its arrays, so that training can hand it from batch to batch.
      evaluated: the module for evaluation and generation, where a row must not depend on those
        beside it; None: ``module``.
      collections: that the module fills in training, for ``penalties``.
      penalties: collections -> name -> (coefficient, value) of what is added to the mean loss.
      masked: the module wants to know which tokens are padding.
      noisy: the module takes ``keys`` [B] of the rows' dropout.
      state: collections that are not optimised and that the module changes in training.
      frozen: see ``Task``.
      settle: (a run's extra) -> extra, once an update.
      routing: the collection in which the module tells what its routers did, if it has any.
    """

    config: Any
    module: nn.Module
    empty_cache: Callable[[int, int], Any]
    has_cache: bool
    states: Callable[[Any], jax.Array] | None
    carries: bool = False
    evaluated: nn.Module | None = None
    collections: tuple[str, ...] = ()
    penalties: Callable[[Any], Mapping[str, tuple[float, jax.Array]]] = lambda found: {}
    masked: bool = False
    noisy: bool = False
    state: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    settle: Callable[[Any], Any] = lambda extra: extra
    routing: str = ""


class DiffusionLM(NamedTuple):
    """A model that predicts all masked tokens of a row from the others.

    Attributes:
      config: of the model; its vocabulary is the tokens and, behind them, the mask.
      module: what is initialised, with ids [B, T].
      apply: (params, ids [B, T], keys [B] of the rows' dropout or None) -> logits [B, T, S].
      network: params -> what samplers ask.
    """

    config: Any
    module: nn.Module
    apply: Callable[..., jax.Array]
    network: Callable[[Any], radd.Network]


def choose(config: Config, families: Mapping[str, Any]) -> Any:
    """The entry of ``config.family``; a ConfigError that lists them if there is none."""
    if config.family not in families:
        raise ConfigError(
            f"task {config.task} has no family {config.family!r}; choose one of"
            f" {', '.join(families)}"
        )
    return families[config.family]


def causal_lm(
    config: Config, vocab_size: int, vocabulary: str, segments: bool, penalised: bool = False
) -> CausalLM:
    """The model of a config.

    Args:
      config: of the run.
      vocab_size: tokens of the data; the model's vocabulary if the config has 0.
      vocabulary: names them in messages.
      segments: rows hold more than one document.
      penalised: the task adds the model's penalties to its loss.

    Raises:
      ValueError: if the model is not one for this data.
    """
    lm = choose(config, _CAUSAL)(config, vocab_size, vocabulary, segments)
    if lm.collections and not penalised:
        raise ConfigError(
            f"task {config.task} cannot train family {config.family}: it leaves out the loss that"
            " keeps the experts busy"
        )
    return lm


def masked_lm(config: Config, vocab_size: int, vocabulary: str) -> tuple[Any, nn.Module]:
    """The config and module of a model that fills in tokens; arguments of :func:`causal_lm`."""
    return choose(config, _MASKED)(config, vocab_size, vocabulary)


def diffusion_lm(config: Config, tokens: int, vocabulary: str) -> DiffusionLM:
    """The model of a config that fills in masks among ``tokens`` tokens.

    Raises:
      ValueError: if the model is not one for this data.
    """
    lm = choose(config, _DIFFUSION)(config, tokens + 1, vocabulary)
    if lm.config.vocab_size != tokens + 1:
        raise ValueError(
            f"model.vocab_size ({lm.config.vocab_size}) must be the {tokens} tokens of {vocabulary}"
            " and the mask: 0 picks it"
        )
    return lm


def _delta_product(config: Config, vocab_size: int, vocabulary: str, segments: bool) -> CausalLM:
    del segments  # always understood
    model = _with_vocabulary(config, delta_product.DeltaProductConfig, vocab_size, vocabulary)
    return CausalLM(
        model,
        delta_product.DeltaProductLM(model),
        lambda batch, length: delta_product.empty_cache(model, batch),
        True,
        lambda cache: jnp.stack([layer.state for layer in cache]),
        carries=True,
    )


def _lightnet(config: Config, vocab_size: int, vocabulary: str, segments: bool) -> CausalLM:
    model = _with_vocabulary(config, lightnet.LightNetLMConfig, vocab_size, vocabulary)
    if not model.causal:
        raise ValueError(f"task {config.task} needs model.causal=true")
    if segments and not model.knows_segments:
        raise ValueError(
            f"model.mixer={model.mixer} knows no segments, and rows of this data hold several:"
            " choose a layout with one document per row, or mixer lightnet or softmax"
        )
    cached = lightnet.has_cache(model)
    return CausalLM(
        model,
        lightnet.LightNetLM(model),
        lambda batch, length: lightnet.empty_cache(model, batch),
        cached,
        (lambda cache: jnp.stack([layer.s for layer in cache.layers])) if cached else None,
        carries=cached,
    )


def _rmoe(config: Config, vocab_size: int, vocabulary: str, segments: bool) -> CausalLM:
    del segments  # always understood
    model = _with_vocabulary(config, rmoe.RMoEConfig, vocab_size, vocabulary)
    return CausalLM(
        model,
        rmoe.RMoELM(model),
        lambda batch, length: rmoe.empty_cache(model, batch, length),
        True,
        None if model.mixer == "attention" else functools.partial(rmoe.states, model),
        masked=True,
        evaluated=rmoe.RMoELM(_dropless(model)),
        **_mixture(model),
    )


def _rmoe_seq(config: Config, vocab_size: int, vocabulary: str, segments: bool) -> CausalLM:
    model = _with_vocabulary(config, rmoe.RMoESeqConfig, vocab_size, vocabulary)
    del segments  # nor padding
    if config.data.get("layout") in ("packed", "padded"):
        raise ConfigError(
            "family rmoe_seq knows neither segments nor padding behind a text: choose data.layout"
            " streams or blocks"
        )
    return CausalLM(
        model,
        rmoe.RMoESeqLM(model),
        lambda batch, length: rmoe.empty_seq_cache(model, batch),
        True,
        None,
        carries=True,
        noisy=True,
        evaluated=rmoe.RMoESeqLM(_dropless(model)),
        **_mixture(model),
    )


def _dropless(model: Any) -> Any:
    """The model with room for every token."""
    if not model.capacity_factor:
        return model
    return dataclasses.replace(model, capacity_factor=0.0, implementation="auto")


def _mixture(model: rmoe.RMoEConfig | rmoe.RMoESeqConfig) -> dict[str, Any]:
    """What a mixture of experts adds to a ``CausalLM``."""

    def penalties(found):
        (sums,) = found[rmoe.STATISTICS]["layers"]["moe"]["sums"]
        balance = rmoe.losses.balance(sums, model.balance_form, model.experts_per_token)
        return {
            "balance_loss": (model.balance_coefficient, balance),
            "z_loss": (model.z_coefficient, rmoe.losses.z_loss(sums)),
        }

    found: dict[str, Any] = {
        "collections": (rmoe.STATISTICS,),
        "penalties": penalties,
        "routing": rmoe.ROUTING,
        "frozen": _FROZEN.get(model.router_head, ()),
    }
    if model.router_balance_rate:
        found["state"] = (rmoe.BALANCE,)
        found["settle"] = lambda extra: {
            **extra,
            rmoe.BALANCE: rmoe.settle(model, extra[rmoe.BALANCE]),
        }
    return found


def _masked_lightnet(config: Config, vocab_size: int, vocabulary: str) -> tuple[Any, nn.Module]:
    model = _with_vocabulary(config, lightnet.LightNetLMConfig, vocab_size, vocabulary)
    if model.causal:
        raise ValueError(f"task {config.task} needs model.causal=false")
    return model, lightnet.LightNetLM(model)


def _radd(config: Config, vocab_size: int, vocabulary: str) -> DiffusionLM:
    model = _with_vocabulary(config, radd.RADDConfig, vocab_size, vocabulary)
    module: Any = radd.RADD(model)

    def apply(params, ids, keys=None, method="__call__"):
        options = {"keys": keys} if model.dropout and keys is not None else {}
        return module.apply({"params": params}, ids, method=method, **options)

    def network(params):
        body, head = (functools.partial(apply, params, method=name) for name in ("body", "head"))
        return radd.Network(body, head, model.vocab_size - 1)

    return DiffusionLM(model, module, apply, network)


def _diffusion_lightnet(config: Config, vocab_size: int, vocabulary: str) -> DiffusionLM:
    model, lm = _masked_lightnet(config, vocab_size, vocabulary)
    module: Any = lm

    def apply(params, ids, keys=None):
        del keys  # there is no dropout
        return module.apply({"params": params}, ids)[0]

    def network(params):
        body = lambda ids: module.apply({"params": params}, ids, hidden_only=True)[0]
        head = functools.partial(lightnet.head, model, params)
        return radd.Network(body, head, model.vocab_size - 1)

    return DiffusionLM(model, module, apply, network)


def _with_vocabulary(config: Config, kind: type, vocab_size: int, vocabulary: str) -> Any:
    size = config.model.get("vocab_size") or vocab_size
    model = build(kind, {**config.model, "vocab_size": size}, "model")
    if model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size ({model.vocab_size}) is smaller than the {vocab_size} tokens of"
            f" {vocabulary}; 0 picks it"
        )
    return model


# Parameters of routers' heads that stay at their first values, from weight decay as well.
_FROZEN = {"random": ("moe/router_head",), "hyper": ("moe/router_hyper_",)}
_CAUSAL = {
    "delta_product": _delta_product,
    "lightnet": _lightnet,
    "rmoe": _rmoe,
    "rmoe_seq": _rmoe_seq,
}
_MASKED = {"lightnet": _masked_lightnet}
_DIFFUSION = {"radd": _radd, "lightnet": _diffusion_lightnet}
