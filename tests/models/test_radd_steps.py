"""The loop over steps against published trajectories; caching changes nothing but the calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from radd_samplers import SCHEDULES, load, table
import scipy.stats

from scanax.models.generation import Sampling
from scanax.models.radd import rates, steps
from scanax.models.radd.network import Network

STRATEGIES = {"direct": None, "top_p": Sampling(top_p=0.9), "top_k": Sampling(top_k=2)}
RUNS = (
    "direct_tweedie_loglinear",
    "direct_tweedie_geometric",
    "direct_euler_loglinear",
    "top_p_tweedie_loglinear",
    "top_k_tweedie_loglinear",
)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def tiny() -> Network:
    """The published architecture with the weights of radd_tiny, in float64."""
    file = load("radd_tiny")
    p = {k.removeprefix("param/"): jnp.asarray(v, jnp.float64) for k, v in file.items() if "/" in k}
    heads, vocab = int(file["cfg_heads"]), int(file["cfg_tokens"])

    def norm(x, name, bias):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        var = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
        x = (x - mean) / jnp.sqrt(var + 1e-5) * p[name + ".weight"][None, None]
        return x + p[bias][None, None]

    def rotated(x_BTHK, angle_TK):
        half = x_BTHK.shape[-1] // 2
        turned = jnp.concatenate([-x_BTHK[..., half:], x_BTHK[..., :half]], axis=-1)
        angle = angle_TK[None, :, None]
        return x_BTHK * jnp.cos(angle) + turned * jnp.sin(angle)

    def body(ids_BT):
        x = p["vocab_embed.embedding"][ids_BT]
        batch, tokens, width = x.shape
        angle = jnp.arange(tokens, dtype=x.dtype)[:, None] * p["rotary_emb.inv_freq"][None]
        angle = jnp.concatenate([angle, angle], axis=-1)
        for i in range(int(file["cfg_blocks"])):
            block = f"blocks.{i}."
            y = norm(x, block + "norm1", block + "norm1.bias")
            qkv = (y @ p[block + "attn_qkv.weight"].T).reshape(batch, tokens, 3, heads, -1)
            q, k, v = rotated(qkv[:, :, 0], angle), rotated(qkv[:, :, 1], angle), qkv[:, :, 2]
            scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / v.shape[-1] ** 0.5
            y = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores, axis=-1), v)
            x = x + y.reshape(batch, tokens, width) @ p[block + "attn_out.weight"].T
            y = norm(x, block + "norm2", block + "norm2.bias")
            y = y @ p[block + "mlp.0.weight"].T + p[block + "mlp.0.bias"][None, None]
            y = jax.nn.gelu(y, approximate=True) @ p[block + "mlp.2.weight"].T
            x = x + y + p[block + "mlp.2.bias"][None, None]
        return norm(x, "output_layer.norm_final", "output_layer.norm_final.bias")

    def head(hidden):
        logits = hidden @ p["output_layer.linear.weight"].T
        return logits + p["output_layer.linear.bias"][None, None]

    return Network(body, head, vocab)


def test_tiny_network(check):
    file, network = load("radd_tiny"), tiny()
    logits = network.head(network.body(jnp.asarray(file["ids"], jnp.int32)))
    check("logits", logits[..., :-1], file["logits_f64"][..., :-1], 1e-10)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("source", ["toy", "radd"])
def test_trajectories(jit, source, name):
    """Published states, and which rows need the network: exactly, whatever the caching."""
    file = load(f"traj_{source}")
    *strategy, method, schedule = name.split("_")
    vocab, n = int(file["vocab"]), int(file["steps"])
    start_BT = np.full((int(file["batch"]), int(file["length"])), vocab, np.int32)
    if "fixed_pos" in file:
        start_BT[:, file["fixed_pos"]] = file["fixed_val"]
    run = functools.partial(
        steps.sample,
        table() if source == "toy" else tiny(),
        None,
        start_BT,
        rates.unmask_rates(SCHEDULES[schedule], n, method),
        STRATEGIES["_".join(strategy)],
        trajectory=True,
    )
    kinds = steps.CACHING if name == RUNS[0] else ("rows",)

    @jit
    def all_kinds(categorical, unmask):
        return [run(caching=c, uniforms_NBTS=categorical, unmask_NBT=unmask) for c in kinds]

    for caching, found in zip(kinds, all_kinds(file["U_cat"], file["U_unmask"]), strict=True):
        np.testing.assert_array_equal(found.trajectory, file[f"x_{name}"])
        np.testing.assert_array_equal(found.tokens, file[f"x_{name}"][-1])
        needs_NB = file[f"needs_eval_{name}"]
        np.testing.assert_array_equal(found.needs, needs_NB)
        np.testing.assert_array_equal(needs_NB.sum(axis=1), file[f"evals_per_step_{name}"])
        any_N = needs_NB.any(axis=1)
        rows, batch = {
            "none": (n, n),
            "batch": (any_N.sum(), any_N.sum()),
            "rows": (needs_NB.sum(axis=0), any_N.sum()),
        }[caching]
        assert np.all(np.asarray(found.evaluations) == rows), caching
        assert int(found.batch_evaluations) == batch, caching


def test_single_steps():
    """All transitions, with psi of the middle of a run."""
    file = load("sampler_step")
    vocab = int(file["mask_id"])
    network = Network(lambda ids_BT: jnp.asarray(file["raw_logits"]), lambda hidden: hidden, vocab)
    ids_BT = file["x_t"].astype(np.int32)
    for name, psi in file.items():
        if not name.startswith("rate_"):
            continue
        key = name.removeprefix("rate_")
        schedule, method, n, i = key.split("_")
        n, i = int(n[1:]), int(i[1:])
        ours_N = rates.unmask_rates(SCHEDULES[schedule], n, method)
        np.testing.assert_allclose(ours_N[i], psi, rtol=1e-9)
        c = jax.nn.softmax(jnp.asarray(file["raw_logits"])[..., :vocab], axis=-1)
        stay = np.full((*c.shape[:2], 1), 1 - ours_N[i])
        probs = np.concatenate([ours_N[i] * c, stay], axis=-1)
        masked = ids_BT == vocab
        np.testing.assert_allclose(probs[masked], file[f"probs_{key}"][masked], atol=1e-10)
        found = steps.sample(
            network,
            None,
            ids_BT,
            np.array([ours_N[i], 1.0]),
            uniforms_NBTS=jnp.stack([jnp.asarray(file["uniforms"])] * 2),
            caching="none",
            trajectory=True,
        )
        assert found.trajectory is not None
        np.testing.assert_array_equal(found.trajectory[1], file[f"next_{key}"])
        np.testing.assert_array_equal(found.trajectory[:, ~masked][2], ids_BT[~masked])


@pytest.mark.parametrize("sampling", [None, Sampling()])
def test_law(jit, sampling):
    """Both ways to draw with keys, in float32, against the exact law."""
    rows = 20000
    psi_N = rates.unmask_rates(SCHEDULES["loglinear"], 4)
    with jax.enable_x64(False):
        start_BT = np.full((rows, 4), 3, np.int32)
        network = table(jnp.float32)
        run = lambda key: steps.sample(network, key, start_BT, psi_N, sampling, caching="batch")
        found = jit(run)(jax.random.key(1))
    counts = np.bincount(np.asarray(found.tokens) @ 3 ** np.arange(3, -1, -1), minlength=81)
    law = load("toy_exact")["opt/law_loglinear_tweedie_n4"].reshape(-1)
    assert scipy.stats.chisquare(counts, rows * law).pvalue > 1e-4


def test_mistakes():
    start_BT, key = np.full((2, 4), 3, np.int32), jax.random.key(0)
    run = functools.partial(steps.sample, table())
    for wrong, message in (
        (lambda: run(key, start_BT + 1, np.ones(1)), r"in \[0, 3\]"),
        (lambda: run(key, start_BT, np.ones(0)), "at least one step"),
        (lambda: run(key, start_BT, np.array([0.5])), "end with 1"),
        (lambda: run(key, start_BT, np.ones(1), caching="some"), "caching must be one of"),
        (lambda: run(None, start_BT, np.ones(1)), "pass key"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
