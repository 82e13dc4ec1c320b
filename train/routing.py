"""What the routers of a mixture of experts do with a text: figures, and pictures of them.

Dimensions: L layers with experts, R rows, C tokens of a row, T tokens of all rows, E experts,
J chosen.

A figure of single tokens is a mean or median over all tokens of the text; a loss, its gradient
and what is dropped depend on how many tokens are computed at once, and are those of batches.
The figures themselves are defined in ``models/rmoe/analysis.py``.
"""

from collections.abc import Callable, Mapping
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import softmax

from ..kernels.dtypes import accumulation_dtype
from ..kernels.expert_mlp import kept
from ..models.rmoe import ROUTING, analysis
from ..models.rmoe.config import MoEConfig
from . import routing_plots

HYPOTHETICAL_CAPACITY = 1.0  # factor that a run without dropping is measured at
BINS = 40  # of the histogram of entropies
GATES = ("head", "embeddings", "hyper_out")  # a router's last matrix: the one of these it has


class Routed(NamedTuple):
    """A language model with routers.

    Attributes:
      config: of its experts and routers.
      apply: (params, ids [R, C]) -> (logits [R, C, S], collections), ``rmoe.ROUTING`` among them;
        of the last ids alone, if those before are only to be seen.
      balance: collections -> the loss that keeps experts busy, without its coefficient.
    """

    config: MoEConfig
    apply: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    balance: Callable[[Any], jax.Array]


class Seen(NamedTuple):
    """What routers did.

    Attributes:
      probs: [L, T, E] float64, of the softmax over all experts.
      index: [L, T, J] the chosen ones.
      keep: [L, T, J] bool, which assignments find a place.
      norms: loss -> part of the routers' parameters -> L2 norm of the gradient, mean over
        batches; see :func:`gradient_norms`.
    """

    probs: np.ndarray
    index: np.ndarray
    keep: np.ndarray
    norms: Mapping[str, Mapping[str, np.ndarray]]


def routing(model: Routed, params: Any, rows: np.ndarray, size: int, folder: pathlib.Path) -> str:
    """Measures a model; writes figures.json and pictures.

    Args:
      model: see there.
      params: of it.
      rows: [R, C + 1] tokens.
      size: rows of a batch; rows that do not fill one up are left out, unless it is the first.
      folder: made if need be.

    Returns:
      A table of the figures.
    """
    size = min(size, len(rows))
    batches = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    seen = observe(model, params, batches)
    found = figures(model.config, params, seen)
    row_tokens = seen.index.shape[1] // (size * len(batches))
    found |= {"batches": len(batches), "batch_rows": size, "row_tokens": row_tokens}
    folder.mkdir(parents=True, exist_ok=True)
    dumps = functools.partial(json.dumps, default=lambda array: array.tolist())
    lines = [f"  {dumps(name)}: {dumps(value)}" for name, value in found.items()]
    (folder / "figures.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    routing_plots.draw(found, folder)
    return table(found)


def observe(model: Routed, params: Any, batches: list[np.ndarray]) -> Seen:
    """Runs batches of tokens [R, C + 1] through a model."""
    step = jax.jit(functools.partial(_observe_batch, model))
    found = [jax.device_get(step(params, jnp.asarray(batch, jnp.int32))) for batch in batches]
    logits, index, keep, norms = zip(*found, strict=True)
    return Seen(
        np.concatenate([softmax(x.astype(np.float64), axis=-1) for x in logits], axis=1),
        np.concatenate(index, axis=1),
        np.concatenate(keep, axis=1),
        jax.tree.map(lambda *x: np.mean(x, axis=0), *norms),
    )


def _observe_batch(model: Routed, params: Any, tokens: jax.Array):
    """Logits, choices and places of one batch, and the norms of its gradients."""
    c = model.config

    def losses(part):
        logits, found = model.apply(_with_routers(params, part), tokens[:, :-1])
        labels = tokens[:, tokens.shape[1] - logits.shape[1] :]
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (ce.mean(), model.balance(found)), found[ROUTING]["layers"]["moe"]

    (lm, balance), backward, found = jax.vjp(losses, routers(params), has_aux=True)
    one, zero = jnp.ones_like, jnp.zeros_like
    norms = {
        "lm": gradient_norms(backward((one(lm), zero(balance)))[0]),
        "balance": gradient_norms(backward((zero(lm), one(balance)))[0]),
    }
    (logits_LTE,), (index_LTJ,) = found["logits"], found["index"]
    factor = c.capacity_factor or HYPOTHETICAL_CAPACITY

    def keep(logits_TE, index_TJ):
        score_TJ = jnp.take_along_axis(jax.nn.softmax(logits_TE, axis=1), index_TJ, axis=1)
        by_score = c.capacity_policy == "score"
        return kept(index_TJ, c.num_experts, factor, score_TJ if by_score else None)

    return logits_LTE, index_LTJ, jax.vmap(keep)(logits_LTE, index_LTJ), norms


def routers(params: Any) -> dict[str, dict[str, jax.Array]]:
    """The routers' parameters: "cell", which all layers share, and "layers", [L, ...] each."""
    prefix = "router_"
    parts = {"cell": params.get("router", {}), "layers": params["layers"]["moe"]}
    return {
        part: {n.removeprefix(prefix): x for n, x in tree.items() if n.startswith(prefix)}
        for part, tree in parts.items()
    }


def _with_routers(params: Any, part: Mapping[str, Mapping[str, jax.Array]]) -> Any:
    """Parameters with those of :func:`routers` in their places."""
    cell, own = ({f"router_{n}": x for n, x in part[p].items()} for p in ("cell", "layers"))
    layers = {**params["layers"], "moe": {**params["layers"]["moe"], **own}}
    return {**params, "layers": layers} | ({"router": cell} if cell else {})


def gradient_norms(gradient: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """L2 norms of a gradient with respect to :func:`routers`.

    Returns:
      "all": [], of everything; "layers": [L], of the layers' own parameters; and, if there is a
      cell, "recurrent": [], of the matrix on its earlier state, biases not included.
    """
    gradient = jax.tree.map(lambda g: g.astype(accumulation_dtype(g.dtype)), gradient)
    found = {
        "all": optax.tree.norm(gradient),
        "layers": jax.vmap(optax.tree.norm)(gradient["layers"]),
    }
    if gradient["cell"]:
        found["recurrent"] = optax.tree.norm(gradient["cell"]["hidden"])
    return found


def figures(c: MoEConfig, params: Any, seen: Seen) -> dict[str, Any]:
    """What is written to figures.json: numbers first, then what they are means of.

    A number is a mean over layers, or over pairs of different layers; gradient norms are of all
    routers together. It is None where there is no such thing: one layer, or no cell.
    """
    layers, pairs = _layers(c, params, seen), _pairs(c, seen)
    different = ~np.eye(len(seen.probs), dtype=bool)
    numbers = {name: x_L.mean() for name, x_L in layers.items()}
    numbers |= {n: x[different].mean() if different.any() else None for n, x in pairs.items()}
    numbers |= {f"grad_norm_{loss}": norms["all"] for loss, norms in seen.norms.items()}
    numbers |= {f"grad_norm_{n}_recurrent": p.get("recurrent") for n, p in seen.norms.items()}
    alike = lambda **how: np.stack(
        [analysis.expert_similarity(m, **how)[1] for m in experts(params)]
    )
    edges, tokens = _histogram(c, seen)
    return {
        **{name: None if x is None else float(x) for name, x in numbers.items()},
        "drop_capacity_factor": c.capacity_factor or HYPOTHETICAL_CAPACITY,
        "drop_policy": c.capacity_policy,
        "drop_happens": c.capacity_factor > 0,
        "balance_coefficient": c.balance_coefficient,
        "gate": _gate(params),
        "layers": layers | {f"grad_norm_{n}": p["layers"] for n, p in seen.norms.items()},
        "pairs": pairs,
        "frequency": analysis.selection_frequency(seen.index, c.num_experts),
        "entropy_histogram": {"edges": edges, "tokens": tokens},
        "expert_similarity": alike(),
        "expert_similarity_unnormalised": alike(normalise=False),
    }


def _layers(c: MoEConfig, params: Any, seen: Seen) -> dict[str, np.ndarray]:
    """Name -> [L]."""
    each = lambda function: np.stack([function(p) for p in seen.probs])
    outer = lambda p: analysis.outer_balance(p, c.experts_per_token)
    alike = lambda **how: np.stack(
        [analysis.expert_similarity(m, **how)[0] for m in experts(params)]
    )
    gate = np.asarray(routers(params)["layers"][_gate(params)], np.float64)
    return {
        "entropy": each(lambda p: analysis.entropy(p).mean()),
        "ib": each(lambda p: np.median(analysis.inner_balance(p))),
        "ob": each(lambda p: np.median(outer(p))),
        "highest_frequency": analysis.selection_frequency(seen.index, c.num_experts).max(axis=1),
        "similarity": alike(),
        "similarity_unnormalised": alike(normalise=False),
        "drop_ratio": analysis.drop_ratio(seen.keep),
        "gate_norm": np.stack([np.linalg.norm(w) for w in gate]),
        "gate_std": np.stack([w.std() for w in gate]),
    }


def _pairs(c: MoEConfig, seen: Seen) -> dict[str, np.ndarray]:
    """Name -> [L, L]; an excess is what shuffled tokens do not have, 0 on the diagonal."""
    top1_LT = seen.index[..., 0]
    top1 = lambda x_LT: analysis.mi_top1(x_LT, c.num_experts)
    found = {"mi_paper": analysis.mi_paper(seen.probs), "mi_top1": top1(top1_LT)}
    chance = {
        "mi_paper": analysis.mi_paper(analysis.shuffled(seen.probs)),
        "mi_top1": top1(analysis.shuffled(top1_LT)),
    }
    return found | {f"{name}_excess": found[name] - chance[name] for name in found}


def _histogram(c: MoEConfig, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Edges [n + 1] between 0 and ln E nats, and how many tokens' entropies are where [L, n]."""
    edges = np.linspace(0, np.log(c.num_experts), BINS + 1)
    inside = lambda p: np.clip(analysis.entropy(p), 0, edges[-1])  # against rounding
    return edges, np.stack([np.histogram(inside(p), edges)[0] for p in seen.probs])


def _gate(params: Any) -> str:
    return next(name for name in GATES if name in routers(params)["layers"])


def experts(params: Any) -> list[list[np.ndarray]]:
    """The matrices of each layer's experts, as ``analysis.expert_similarity`` takes them."""
    moe = {name: np.asarray(x) for name, x in params["layers"]["moe"].items()}
    parts = [moe[name] for name in ("up", "gate") if name in moe] + [moe["down"].swapaxes(2, 3)]
    return [list(layer) for layer in zip(*parts, strict=True)]


def table(found: Mapping[str, Any]) -> str:
    """The figures for people: a line per layer, their means, and what is not of single layers."""
    columns = {
        "entropy": "entropy",
        "ib": "IB",
        "ob": "OB",
        "highest_frequency": "busiest",
        "similarity": "similarity",
        "drop_ratio": "dropped",
        "gate_norm": "gate norm",
        "gate_std": "gate std",
    }
    row = lambda name, cells: f"{name:>5}" + "".join(f"{x:>11.4g}" for x in cells)
    values = zip(*(found["layers"][name] for name in columns), strict=True)
    lines = [f"{'layer':>5}" + "".join(f"{title:>11}" for title in columns.values())]
    lines += [row(layer, cells) for layer, cells in enumerate(values)]
    lines.append(row("mean", [found[name] for name in columns]))
    capacity = f"capacity factor {found['drop_capacity_factor']:g} by {found['drop_policy']}"
    nothing = "" if found["drop_happens"] else ", if there were one: this run drops nothing"
    lines.append(f"dropped: at {capacity}{nothing}")
    if found["mi_top1"] is not None:
        for name in ("mi_paper", "mi_top1"):
            information, excess = found[name], found[f"{name}_excess"]
            lines.append(f"{name}: {information:.4g} nats, {excess:.4g} above shuffled tokens")
    coefficient = found["balance_coefficient"]
    titles = {"lm": "LM loss", "balance": f"balance loss (without its factor {coefficient:g})"}
    for name, title in titles.items():
        recurrent = found[f"grad_norm_{name}_recurrent"]
        end = "" if recurrent is None else f", of the cell's recurrent matrix {recurrent:.4g}"
        lines.append(
            f"gradient of the {title}: of all routers {found[f'grad_norm_{name}']:.4g}{end}"
        )
    return "\n".join(lines)
