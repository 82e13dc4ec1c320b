"""The analysis of routers: against the models' own values, and from the command line."""

import dataclasses
import json
from typing import NamedTuple

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from scanax.configs import base
from scanax.models import params as params_lib
from scanax.models.rmoe import (
    ROUTING,
    STATISTICS,
    RMoEConfig,
    RMoELM,
    RMoESeqConfig,
    RMoESeqLM,
    analysis,
    losses,
)
from scanax.train import routing, routing_plots

SMALL = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 12,
    "dense_intermediate_size": 12,
    "num_experts": 8,
    "router_dim": 6,
    "initializer_range": 0.5,
    "span": 4,
    "dropout": 0.1,
}
FILES = ["entropy.png", "figures.json", "frequency.png", "information.png", "similarity.png"]
CASES = {
    "full": (RMoEConfig, {"router_residual": 0.5, "remat": True}),
    "np": (
        RMoEConfig,
        {"router_memory": "none", "num_dense_layers": 1, "num_hidden_layers": 4}
        | {"capacity_factor": 0.5, "capacity_policy": "score"},
    ),
    "xmoe": (
        RMoESeqConfig,
        {"router_cell": "none", "router_head": "xmoe", "router_bias": True}
        | {"capacity_factor": 1.25, "capacity_policy": "position"},
    ),
}


class Case(NamedTuple):
    """A model with 3 layers and 8 experts, measured in batches of 2 rows of 12 tokens."""

    name: str
    config: RMoEConfig | RMoESeqConfig
    params: dict
    seen: routing.Seen
    found: dict  # figures
    direct: list  # for each batch: collection of routing; gradient of both losses


@pytest.fixture(scope="module", params=CASES)
def case(request):
    kind, changes = CASES[request.param]
    values = base.get_config("language_model", "rmoe").model.to_dict() | SMALL | changes
    c = kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
    module = (RMoELM if kind is RMoEConfig else RMoESeqLM)(c)

    def apply(params, ids):
        (logits, _), found = module.apply({"params": params}, ids, mutable=[STATISTICS, ROUTING])
        return logits, found

    def balance(found):
        (sums,) = found[STATISTICS]["layers"]["moe"]["sums"]
        return losses.balance(sums, c.balance_form, c.experts_per_token)

    def lm_loss(params, tokens):
        log_p = jax.nn.log_softmax(apply(params, tokens[:, :-1])[0])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2).mean()

    def balance_loss(params, tokens):
        return balance(apply(params, tokens[:, :-1])[1])

    @jax.jit
    def direct(params, tokens):
        seen = apply(params, tokens[:, :-1])[1][ROUTING]["layers"]["moe"]
        lm, spread = (jax.grad(f)(params, tokens) for f in (lm_loss, balance_loss))
        return seen, {"lm": lm, "balance": spread}

    example = jnp.zeros((1, 2), jnp.int32)
    init = jax.jit(lambda key: params_lib.initialise(module, key, example))
    params = init(jax.random.key(0))
    rows = np.random.default_rng(0).integers(0, 11, (4, 13)).astype(np.int32)
    batches = [rows[:2], rows[2:]]
    seen = routing.observe(routing.Routed(c, apply, balance), params, batches)
    found = routing.figures(c, params, seen)
    return Case(request.param, c, params, seen, found, [direct(params, b) for b in batches])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)


def test_figures_of_layers(case):
    """Those of the sown logits, and of the parameters, by analysis.py."""
    sown = lambda name: np.concatenate([seen[name][0] for seen, _ in case.direct], axis=1)
    logits, index, found = sown("logits"), sown("index"), case.found
    assert logits.shape == (3, 48, 8) and index.shape == (3, 48, 2)
    probs = softmax(logits.astype(np.float64), axis=-1)
    entropy, frequency = analysis.entropy(probs), analysis.selection_frequency(index, 8)
    close(found["frequency"], frequency)
    own = {name: np.asarray(x) for name, x in case.params["layers"]["moe"].items()}
    matrices = [own["up"], own["down"].swapaxes(2, 3)]
    matrices += [own["gate"]] if case.name != "xmoe" else []
    alike, plain = (
        [analysis.expert_similarity([m[i] for m in matrices], normalise) for i in range(3)]
        for normalise in (True, False)
    )
    close(found["expert_similarity"], [matrix for _, matrix in alike])
    close(found["expert_similarity_unnormalised"], [matrix for _, matrix in plain])
    gate = own["router_embeddings" if case.name == "xmoe" else "router_head"]
    for name, values in {
        "entropy": entropy.mean(axis=1),
        "ib": np.median(analysis.inner_balance(probs), axis=1),
        "ob": np.median(analysis.outer_balance(probs, 2), axis=1),
        "highest_frequency": frequency.max(axis=1),
        "similarity": np.asarray([mean for mean, _ in alike]),
        "similarity_unnormalised": np.asarray([mean for mean, _ in plain]),
        "gate_norm": np.linalg.norm(gate.reshape(3, -1), axis=1),
        "gate_std": gate.std(axis=(1, 2)),
    }.items():
        close(found["layers"][name], values)
        close(found[name], values.mean())
    tokens, edges = (found["entropy_histogram"][name] for name in ("tokens", "edges"))
    assert edges[0] == 0 and np.isclose(edges[-1], np.log(8)) and (tokens.sum(axis=1) == 48).all()
    for edge in (10, 30):
        assert (tokens[:, edge:].sum(axis=1) == (entropy >= edges[edge]).sum(axis=1)).all()
    lines = routing.table(found).splitlines()
    assert lines[1].split()[:2] == ["0", f"{found['layers']['entropy'][0]:.4g}"]
    assert lines[4].split()[:2] == ["mean", f"{entropy.mean():.4g}"]


def test_information_between_layers(case):
    different = ~np.eye(3, dtype=bool)
    for name, function, x in (
        ("mi_paper", analysis.mi_paper, case.seen.probs),
        ("mi_top1", lambda top1: analysis.mi_top1(top1, 8), case.seen.index[..., 0]),
    ):
        pairs = {name: function(x)}
        pairs[f"{name}_excess"] = pairs[name] - function(analysis.shuffled(x))
        for key, matrix in pairs.items():
            close(case.found["pairs"][key], matrix)
            close(case.found[key], matrix[different].mean())


def test_dropped_are_those_beyond_the_places_of_an_expert(case):
    """In each batch on its own: the rows of two do not share places."""
    factor, dropped = case.config.capacity_factor or 1.0, np.zeros(3)
    for seen, _ in case.direct:
        places = int(np.ceil(factor * 24 * 2 / 8))
        for layer, index in enumerate(np.asarray(seen["index"][0])):
            counts = np.bincount(index.ravel(), minlength=8)
            dropped[layer] += np.maximum(counts - places, 0).sum()
    assert dropped.min() > 0
    close(case.found["layers"]["drop_ratio"], dropped / 96)
    close(case.found["drop_ratio"], dropped.mean() / 96)
    assert case.found["drop_capacity_factor"] == factor
    assert case.found["drop_happens"] == (case.name != "full")
    assert ("this run drops nothing" in routing.table(case.found)) == (case.name == "full")


@pytest.mark.parametrize("loss", ["lm", "balance"])
def test_gradient_norms(case, loss):
    """Means over batches of the norms of the gradients with respect to all parameters."""
    whole, layers, recurrent = [], [], []
    for gradient in (gradients[loss] for _, gradients in case.direct):
        own = {n: x for n, x in gradient["layers"]["moe"].items() if n.startswith("router_")}
        square_L = sum(np.square(x).reshape(3, -1).sum(axis=1) for x in own.values())
        cell = gradient.get("router", {})
        whole.append(np.sqrt(square_L.sum() + sum(np.square(x).sum() for x in cell.values())))
        layers.append(np.sqrt(square_L))
        recurrent += [np.linalg.norm(cell["router_hidden"])] if cell else []
    assert np.mean(whole) > 1e-4
    close(case.found[f"grad_norm_{loss}"], np.mean(whole))
    close(case.found["layers"][f"grad_norm_{loss}"], np.mean(layers, axis=0))
    found = case.found[f"grad_norm_{loss}_recurrent"]
    if case.name == "xmoe":  # there is no cell
        assert found is None
    else:
        close(found, np.mean(recurrent))
        assert (found == 0) == (case.name == "np")


def test_one_layer_has_no_others(case, tmp_path):
    first = lambda tree: jax.tree.map(lambda x: x[:1], tree)
    norms = {"all": np.float32(1), "layers": np.ones(1, np.float32)}
    seen = routing.Seen(*first(tuple(case.seen[:3])), {"lm": norms, "balance": norms})
    params = {**case.params, "layers": first(case.params["layers"])}
    found = routing.figures(case.config, params, seen)
    assert found["mi_top1"] is None and found["mi_paper_excess"] is None
    assert "mi_" not in routing.table(found)
    routing_plots.draw(found, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == set(FILES) - {"figures.json", "information.png"}


def test_from_the_command_line(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 12, "router_dim": 8}
    flags = [f"--config.model.{name}={value}" for name, value in sizes.items()]
    flags += ["--config.num_steps=2", "--config.optimizer.warmup_steps=0", "--config.batch_size=4"]
    flags += ["--config.microbatches=2", "--config.data.length=32", "--config.evaluation.batches=1"]
    flags += ["--config.evaluation.batch_size=4"]
    where = f"--workdir={tmp_path / 'run'}"
    result = command.run_forked(
        command.command("main", "--config=configs/rmoe_lm_embedded.py", where, *flags)
    )
    assert result.returncode == 0, result.stdout
    evaluate = command.command("evaluate", where, "--analysis=routing", "--rows=7", "--length=16")
    result = command.run_forked(evaluate)
    assert result.returncode == 0, result.stdout
    folder = tmp_path / "run" / "eval" / "00000002" / "routing"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    found = json.loads((folder / "figures.json").read_text())
    assert (found["batches"], found["batch_rows"], found["row_tokens"]) == (3, 2, 16)
    assert 0 < found["grad_norm_balance_recurrent"] < found["grad_norm_balance"]
    assert "busiest" in result.stdout and f"written to {folder}" in result.stdout
