"""The analysis of routers: against the models' own values, and from the command line."""

import dataclasses
import json

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
from scanax.train import routing

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


def case(kind=RMoEConfig, **changes):
    """A model and its parameters, and 5 rows of 13 tokens."""
    values = base.get_config("language_model", "rmoe").model.to_dict() | SMALL | changes
    c = kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
    module = (RMoELM if kind is RMoEConfig else RMoESeqLM)(c)

    def apply(params, ids):
        (logits, _), found = module.apply({"params": params}, ids, mutable=[STATISTICS, ROUTING])
        return logits, found

    def balance(found):
        (sums,) = found[STATISTICS]["layers"]["moe"]["sums"]
        return losses.balance(sums, c.balance_form, c.experts_per_token)

    rows = np.random.default_rng(0).integers(0, 11, (5, 13)).astype(np.uint16)
    params = params_lib.initialise(module, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return routing.Routed(c, apply, balance), params, rows


def measure(model, params, rows, folder, size=2):
    text = routing.routing(model, params, rows, size, folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(path.stat().st_size > 2000 for path in folder.glob("*.png"))
    return text, json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize(
    "kind, changes",
    [
        (RMoEConfig, {"router_residual": 0.5}),
        (RMoEConfig, {"num_dense_layers": 1, "num_hidden_layers": 4}),
        (RMoESeqConfig, {"router_bias": True, "router_cell": "none"}),
    ],
)
def test_figures_are_those_of_the_sown_logits(tmp_path, kind, changes):
    model, params, rows = case(kind, **changes)
    text, found = measure(model, params, rows, tmp_path)
    assert (found["batches"], found["batch_rows"], found["row_tokens"]) == (2, 2, 12)
    parts = [model.apply(params, rows[i : i + 2, :-1].astype(np.int32))[1] for i in (0, 2)]
    moe = [part[ROUTING]["layers"]["moe"] for part in parts]
    logits = np.concatenate([m["logits"][0] for m in moe], axis=1)
    index = np.concatenate([m["index"][0] for m in moe], axis=1)
    assert logits.shape == (3, 48, 8) and index.shape == (3, 48, 2)
    probs = softmax(logits.astype(np.float64), axis=-1)
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    entropy = analysis.entropy(probs)
    frequency = analysis.selection_frequency(index, 8)
    layers = {
        "entropy": entropy.mean(axis=1),
        "ib": np.median(analysis.inner_balance(probs), axis=1),
        "ob": np.median(analysis.outer_balance(probs, 2), axis=1),
        "highest_frequency": frequency.max(axis=1),
    }
    close(found["frequency"], frequency)
    own = {name: np.asarray(x) for name, x in params["layers"]["moe"].items()}
    matrices = [own["up"], own["down"].swapaxes(2, 3)]
    matrices += [own["gate"]] if kind is RMoEConfig else []
    for name, normalise in (("similarity", True), ("similarity_unnormalised", False)):
        alike = [analysis.expert_similarity([m[i] for m in matrices], normalise) for i in range(3)]
        layers[name] = np.asarray([mean for mean, _ in alike])
        close(found[f"expert_{name}"], [matrix for _, matrix in alike])
    assert found["gate"] == "head"
    layers["gate_norm"] = np.linalg.norm(own["router_head"].reshape(3, -1), axis=1)
    layers["gate_std"] = own["router_head"].std(axis=(1, 2))
    for name, values in layers.items():
        close(found["layers"][name], values)
        close(found[name], values.mean())
    counts = np.asarray(found["entropy_histogram"]["tokens"])
    edges = np.asarray(found["entropy_histogram"]["edges"])
    assert edges[0] == 0 and np.isclose(edges[-1], np.log(8)) and (counts.sum(axis=1) == 48).all()
    assert (counts[:, 30:].sum(axis=1) == (entropy >= edges[30]).sum(axis=1)).all()
    off = ~np.eye(3, dtype=bool)
    for name, function, x in (
        ("mi_paper", analysis.mi_paper, probs),
        ("mi_top1", lambda top1: analysis.mi_top1(top1, 8), index[..., 0]),
    ):
        between = function(x)
        close(found["pairs"][name], between)
        close(found[name], between[off].mean())
        excess = between - function(analysis.shuffled(x))
        close(found["pairs"][f"{name}_excess"], excess)
        close(found[f"{name}_excess"], excess[off].mean())
    lines = text.splitlines()
    assert lines[1].split()[:2] == ["0", f"{found['layers']['entropy'][0]:.4g}"]
    assert lines[4].split()[:2] == ["mean", f"{found['entropy']:.4g}"]


@pytest.mark.parametrize("factor, policy", [(0.0, "score"), (0.5, "score"), (1.25, "position")])
def test_dropped_are_those_beyond_the_places_of_an_expert(tmp_path, factor, policy):
    """In each batch on its own: the rows of two do not share places."""
    model, params, rows = case(capacity_factor=factor, capacity_policy=policy)
    text, found = measure(model, params, rows, tmp_path)
    dropped = np.zeros(3)
    for start in (0, 2):
        ids = rows[start : start + 2, :-1].astype(np.int32)
        (index,) = model.apply(params, ids)[1][ROUTING]["layers"]["moe"]["index"]
        places = int(np.ceil((factor or 1.0) * 24 * 2 / 8))
        for layer in range(3):
            counts = np.bincount(np.asarray(index[layer]).ravel(), minlength=8)
            dropped[layer] += np.maximum(counts - places, 0).sum()
    assert dropped.min() > 0
    np.testing.assert_allclose(found["layers"]["drop_ratio"], dropped / 96, rtol=1e-6)
    np.testing.assert_allclose(found["drop_ratio"], dropped.mean() / 96, rtol=1e-6)
    assert found["drop_capacity_factor"] == (factor or 1.0) and found["drop_policy"] == policy
    assert found["drop_happens"] == (factor > 0)
    assert ("this run does not" in text) == (factor == 0)


@pytest.mark.parametrize(
    "changes, recurrent",
    [
        ({}, "all"),
        ({"router_memory": "none"}, "zero"),
        ({"router_memory": "detach", "num_dense_layers": 1, "remat": True}, "all"),
        ({"router_cell": "none", "router_head": "random"}, "absent"),
        ({"router_cell": "none", "router_head": "xmoe"}, "absent"),
    ],
)
def test_gradient_norms(tmp_path, changes, recurrent):
    model, params, rows = case(**changes)
    _, found = measure(model, params, rows, tmp_path)

    def lm(params, tokens):
        log_p = jax.nn.log_softmax(model.apply(params, tokens[:, :-1])[0])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2).mean()

    balance = lambda params, tokens: model.balance(model.apply(params, tokens[:, :-1])[1])
    for name, loss in (("lm", lm), ("balance", balance)):
        gradient = jax.jit(jax.grad(loss))
        squares, layers, matrix = [], [], []
        for start in (0, 2):
            g = gradient(params, jnp.asarray(rows[start : start + 2], jnp.int32))
            own = {n: x for n, x in g["layers"]["moe"].items() if n.startswith("router")}
            per_layer = sum(np.square(x).reshape(len(x), -1).sum(axis=1) for x in own.values())
            cell = sum(np.square(x).sum() for x in g.get("router", {}).values())
            squares.append(per_layer.sum() + cell)
            layers.append(np.sqrt(per_layer))
            matrix.append(np.linalg.norm(g["router"]["router_hidden"]) if cell else 0)
        close = lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-7)
        close(found[f"grad_norm_{name}"], np.mean(np.sqrt(squares)))
        close(found["layers"][f"grad_norm_{name}"], np.mean(layers, axis=0))
        assert (found[f"grad_norm_{name}"] == 0) == (changes.get("router_head") == "random")
        got = found[f"grad_norm_{name}_recurrent"]
        if recurrent == "absent":
            assert got is None
        else:
            assert (got == 0) == (recurrent == "zero")
            close(got, np.mean(matrix))


def test_one_layer_has_no_others(tmp_path):
    text, found = measure(*case(num_hidden_layers=1), tmp_path, size=9)
    assert found["mi_top1"] is None and found["mi_paper_excess"] is None and "mi_" not in text
    assert (found["batches"], found["batch_rows"]) == (1, 5)


def test_from_the_command_line(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 12, "router_dim": 8}
    flags = [f"--config.model.{name}={value}" for name, value in sizes.items()]
    flags += ["--config.num_steps=2", "--config.optimizer.warmup_steps=0", "--config.batch_size=4"]
    flags += ["--config.microbatches=2", "--config.data.length=32", "--config.evaluation.batches=1"]
    flags += ["--config.evaluation.batch_size=4"]
    where = f"--workdir={tmp_path / 'run'}"
    result = command.run(
        command.command("main", "--config=configs/rmoe_lm_embedded.py", where, *flags)
    )
    assert result.returncode == 0, result.stdout
    evaluate = command.command("evaluate", where, "--analysis=routing", "--rows=7", "--length=16")
    result = command.run(evaluate)
    assert result.returncode == 0, result.stdout
    folder = tmp_path / "run" / "eval" / "00000002" / "routing"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    found = json.loads((folder / "figures.json").read_text())
    assert (found["batches"], found["batch_rows"], found["row_tokens"]) == (3, 2, 16)
    assert 0 < found["grad_norm_balance_recurrent"] < found["grad_norm_balance"]
    assert "busiest" in result.stdout and f"written to {folder}" in result.stdout
