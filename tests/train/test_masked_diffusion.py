"""Masked diffusion as a task: losses, evaluation, samples, prompts, gaps, analyses, mistakes."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from stepping import train

from scanax.configs import base
from scanax.models import radd
from scanax.models.generation import Sampling
from scanax.train import run as run_lib, tasks
from scanax.train.config import ConfigError, from_dict
from scanax.train.data.pipeline import DataError

SMALL = {
    "batch_size": 8,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.num_hidden_layers": 1,
    "data.source": "files",
    "data.path": "*.txt",
    "data.length": 12,
    "data.tokenizer": "char",
    "data.end_of_document": False,
    "data.eval_fraction": 0.3,
    "evaluation.batch_size": 4,
    "evaluation.batches": 1,
    "objective.eval_draws": 6,
    "sampler.steps": 20,
    "sampler.block": 6,
    "sampler.slots": 3,
    "mesh.data": 1,
}


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    for i in range(24):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i} abba " * 5)
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))


def values(family: str = "radd", task: str = "masked_diffusion", **changes):
    found = base.get_config(task, family)
    own = {k: v for k, v in SMALL.items() if k.split(".")[0] != "sampler" or found.sampler}
    own = {k: v for k, v in own.items() if k.split(".")[0] != "objective" or found.objective}
    found.update_from_flattened_dict({**own, **changes})
    return found


def config(family: str = "radd", **changes):
    return from_dict(values(family, **changes).to_dict())


@functools.cache
def built(**changes):
    """A task with parameters whose logits are not all equal."""
    task = tasks.build(config(**changes))
    params, extra = task.init(jax.random.key(0))
    head = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = jax.random.normal(jax.random.key(1), head.shape)
    return task, params, extra


@pytest.mark.parametrize("family", ["radd", "lightnet"])
@pytest.mark.parametrize("loss", ["lambda_dce", "k_dce"])
def test_same_losses_on_any_mesh_and_accumulation(family, loss):
    """Masks belong to the examples, and times are drawn over the whole batch."""
    options = {"objective.loss": loss}
    options |= {"model.gate_low_rank_dim": 4} if family == "lightnet" else {"model.dropout": 0.1}
    with jax.numpy_dtype_promotion("standard"):  # inside of optax
        _, losses = train(config(family, **options), 3)
        for variant in ({"microbatches": 2}, {"mesh.data": 2, "mesh.fsdp": 2}):
            _, found = train(config(family, **options, **variant), 3)
            np.testing.assert_allclose(found, losses, rtol=1e-5)


@pytest.mark.parametrize("how", ["vdm", "decoupled", "iid"])
def test_times_are_drawn_over_the_whole_batch(how):
    task = tasks.build(config(**{"objective.times": how}))
    whole = next(task.train_data(0, 1))["u"]
    halves = [next(task.train_data(i, 2))["u"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    assert whole.dtype == np.float32 and 0 <= whole.min() and whole.max() < 1
    gaps = np.diff(np.sort(whole))
    if how == "vdm":
        np.testing.assert_allclose(gaps, 1 / 8, atol=1e-6)
    if how == "decoupled":
        assert (np.floor(whole * 8) == np.arange(8)).all()
    data = task.train_data(0, 1)
    assert not np.array_equal(*(next(data)["u"] for _ in range(2)))


def test_evaluation_estimates_the_bound():
    """On rows short enough to sum over all sets of masks."""
    length, draws = 4, 4096
    changes = {"data.length": length, "objective.eval_draws": draws, "sampler.block": 2}
    task, params, _ = built(**changes)
    batch = task.eval_data(0)
    keys = jax.random.split(jax.random.key(2), 4)
    sums = jax.jit(task.evaluate)(params, {}, batch, keys)
    mask = radd_vocabulary(params)
    network = jax.jit(lambda ids: jax.nn.log_softmax(apply(params, ids)[..., :mask], axis=-1))
    exact_B = radd.exact.bound(network, np.asarray(batch["ids"]), mask)
    found, rows = (float(x) for x in sums["loss"])
    assert rows == 4
    # Sizes are stratified, so that the sets of one size are all that is left to chance.
    spread = math.sqrt(float(sums["nats_squared"][0]) / 4)
    assert abs(found / 4 - exact_B.mean()) < 4 * spread / math.sqrt(4 * draws)
    np.testing.assert_allclose(
        float(sums["bits_per_byte"][0] / sums["bits_per_byte"][1]),
        found / 4 / length / math.log(2),
        rtol=1e-5,
    )


def radd_vocabulary(params) -> int:
    return params["embeddings"].shape[0] - 1


def apply(params, ids):
    sizes = (radd_vocabulary(params) + 1, 16, 1, 2)
    c = radd.RADDConfig(*sizes, 0.0, 1e4, "float32", "float32", False)
    return radd.RADD(c).apply({"params": params}, ids)


def test_derived_figures():
    task, _, _ = built()
    nats = np.asarray([10.0, 14.0, 12.0])
    totals = {
        "loss": (nats.sum(), 3.0),
        "nats_per_token": (nats.sum(), 36.0),
        "nats_squared": ((nats**2).sum(), 3.0),
    }
    found = task.derive(totals, {name: a / b for name, (a, b) in totals.items()})
    assert found["perplexity"] == pytest.approx(math.exp(1.0))
    assert found["standard_error"] == pytest.approx(nats.std(ddof=1) / 3**0.5 / 12)
    one = {name: (a / 3, b / 3) for name, (a, b) in totals.items()}
    alone = task.derive(one, {name: a / b for name, (a, b) in one.items()})
    assert np.isnan(alone["standard_error"])


def test_a_schedule_that_does_not_mask_all_is_told(caplog):
    with caplog.at_level("WARNING", "scanax"):
        tasks.build(config(**{"objective.schedule": "geometric:0.001:1"}))
    assert "masks only 63 % at time 1" in caplog.text


def test_sampling_again_compiles_nothing():
    task, params, extra = built()
    task.sample(params, extra, jax.random.key(0), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radd.events, "sample", None)  # what tracing would call
        task.sample(params, extra, jax.random.key(1), 2)


ORDERS = ("diffusion", "forward", "backward", "random", "first_hitting", "confidence", "entropy")


@pytest.mark.parametrize("order", ORDERS)
def test_samples(order):
    """No mask is left, and a row does not depend on those beside it."""
    task, params, extra = built(**{"sampler.order": order})
    key, mask = jax.random.key(3), radd_vocabulary(params)
    rows = task.sample(params, extra, key, 5)
    assert rows.shape == (5, 12) and rows.min() >= 0 and rows.max() < mask
    np.testing.assert_array_equal(task.sample(params, extra, key, 2), rows[:2])
    assert len(np.unique(rows, axis=0)) == 5
    assert task.render(rows).count("---") == 10


def test_temperature_and_filters():
    task, params, extra = built(**{"sampler.temperature": 0.0, "sampler.order": "forward"})
    rows = task.sample(params, extra, jax.random.key(0), 2)
    np.testing.assert_array_equal(rows[0], rows[1])
    same, _, _ = built(**{"sampler.top_k": 1, "sampler.order": "forward"})
    np.testing.assert_array_equal(same.sample(params, extra, jax.random.key(1), 1)[0], rows[0])


def complete(task, params, texts, **options):
    options = {"sampling": Sampling(), "max_tokens": 5, **options}
    return task.complete(params, {}, jax.random.key(4), texts, **options)


@pytest.mark.parametrize("most", [5, 40])
def test_prompts_are_continued(most):
    """Also beyond the context of 12, block by block."""
    task, params, _ = built()
    found = complete(task, params, ["1 ab", "2"], max_tokens=most)
    assert [len(ids) for ids in found.tokens] == [most, most]
    assert found.prompt_tokens == 5 and found.new_tokens == 2 * most
    assert max(ids.max() for ids in found.tokens) < radd_vocabulary(params)
    part = task.decode(found.tokens[0])[1:3]
    stopped = complete(task, params, ["1 ab", "2"], max_tokens=most, stops=[part])
    assert stopped.stopped[0] and task.decode(stopped.tokens[0]) in task.decode(found.tokens[0])
    assert part not in task.decode(stopped.tokens[0])


def test_gaps_are_filled():
    task, params, extra = built()
    given = ["1 [[3]]ba", "abba[[0]]", "[[12]]", "a[[1]]b[[2]]"]
    tokens, lengths = task.infill(params, extra, jax.random.key(0), given)
    texts = [task.decode(ids[:n]) for ids, n in zip(tokens, lengths, strict=True)]
    assert lengths == [7, 4, 12, 5]
    assert texts[0].startswith("1 ") and texts[0].endswith("ba") and texts[1] == "abba"
    assert texts[3][0] == "a" and texts[3][2] == "b"
    mask = radd_vocabulary(params)
    for ids, n in zip(tokens, lengths, strict=True):
        assert ids[:n].max() < mask and (ids[n:] == mask).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, p: complete(t, p, ["ab" * 6]), "12 tokens and leaves no room in the context"),
        (lambda t, p: t.infill(p, {}, jax.random.key(0), ["a[[12]]"]), "13 tokens with its gaps"),
        (lambda t, p: t.infill(p, {}, jax.random.key(0), ["[[99999999999]]"]), "99999999999 tok"),
        (lambda t, p: t.infill(p, {}, jax.random.key(0), ["a[[ 3 ]]"]), "text 0 has no gap"),
        (lambda t, p: complete(t, p, ["aß"]), "no token for 'ß'"),
    ],
)
def test_texts_that_do_not_fit(call, message):
    task, params, _ = built()
    with pytest.raises(DataError, match=message):
        call(task, params)


def test_sampling_that_does_not_fit():
    task, params, _ = built()
    with pytest.raises(ConfigError, match="repetition_penalty is for models that write from left"):
        complete(task, params, ["a"], sampling=Sampling(repetition_penalty=1.2))
    task, params, _ = built(**{"sampler.order": "entropy"})
    with pytest.raises(ConfigError, match="order=entropy does not go beyond the context"):
        complete(task, params, ["a"], max_tokens=30)
    task, params, _ = built(**{"sampler.block": 12})
    with pytest.raises(ConfigError, match=r"sampler.block \(12\) must be below the context"):
        complete(task, params, ["a"], max_tokens=30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.loss": "elbo"}, "objective.loss must be one of t_dse"),
        ({"objective.schedule": "log"}, "objective: "),
        ({"objective.times": "sobol"}, "unknown draw of times 'sobol'"),
        ({"objective.eval_draws": 0}, "eval_draws must be at least 1"),
        ({"sampler.steps": 0}, "sampler.steps must be at least 1"),
        ({"sampler.order": "left"}, "sampler.order must be one of diffusion, forward"),
        ({"sampler.method": "heun"}, "sampler.method must be one of tweedie, euler"),
        ({"sampler.top_p": 0.0}, "sampler.top_p must be in"),
        ({"model.vocab_size": 300}, r"vocab_size \(300\) must be the \d+ tokens of data.tokenizer"),
        ({"data.layout": "packed"}, "rows are whole, choose blocks or rows"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        tasks.build(config(**changes))


def test_resumed_runs_are_bitwise_the_same(tmp_path):
    changes = {"num_steps": 6, "evaluation.samples": 0, "checkpoint.every_steps": 3}
    with jax.numpy_dtype_promotion("standard"):
        whole = run_lib.train(values(**changes), tmp_path / "run")
        shutil.rmtree(tmp_path / "run/checkpoints/6")
        assert run_lib.load(tmp_path / "run").step == 3
        parts = run_lib.train(values(**changes), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)


def test_analyses_of_a_run(tmp_path):
    """The bound with its errors, and samples as a causal model sees them."""
    changes = {"num_steps": 2, "evaluation.samples": 0}
    causal = {"data.length": 12, "model.gate_low_rank_dim": 4}
    with jax.numpy_dtype_promotion("standard"):
        run_lib.train(values(**changes), tmp_path / "radd")
        scorer = values("lightnet", "language_model", **changes, **causal)
        run_lib.train(scorer, tmp_path / "scorer")
        packed = {"data.layout": "packed", "data.length": 80, "model.router_dim": 4}
        run_lib.train(values("rmoe", "language_model", **changes, **packed), tmp_path / "packed")
    own = {"likelihood_draws": "64", "scorer": str(tmp_path / "scorer")}
    run = run_lib.load(tmp_path / "radd", sampler=own)
    call = lambda name, rows: run.task.analyses[name](run.params, run.extra, tmp_path, rows, 0)
    found = json.loads(call("likelihood", 6))
    assert found == json.loads((tmp_path / "likelihood.json").read_text())
    published, ours = found["published"], found["stratified"]
    assert (published["loss"], ours["loss"]) == ("lambda_dce", "k_dce (stratified)")
    assert published["rows"] == 6 and published["draws"] == 64
    assert ours["perplexity"] == pytest.approx(math.exp(ours["nats_per_token"]))
    assert ours["standard_error_draws_at_most"] < published["standard_error_draws_at_most"]
    assert abs(ours["nats_per_token"] - published["nats_per_token"]) < 1

    found = json.loads(call("generative_perplexity", 8))
    assert found["samples"] == 8 and 0 < found["unigram_entropy"] < math.log(12)
    for name in ("perplexity_tokens", "perplexity_text"):  # an untrained model knows little
        assert 3 < found[name] < 60
    # An untrained model's guess is near uniform, in rows that a mixture takes for documents too.
    again = run_lib.load(tmp_path / "radd", sampler={"scorer": str(tmp_path / "packed")})
    text = again.task.analyses["generative_perplexity"](run.params, run.extra, tmp_path, 8, 0)
    assert 3 < json.loads(text)["perplexity_tokens"] < 60
    single = json.loads(call("likelihood", 1))
    assert single["published"]["standard_error_rows"] is None
    with pytest.raises(ConfigError, match="needs --sampler scorer=DIR"):
        other = run_lib.load(tmp_path / "radd")
        other.task.analyses["generative_perplexity"](run.params, run.extra, tmp_path, 8, 0)
    with pytest.raises(ConfigError, match="must be a language_model"):
        other = run_lib.load(tmp_path / "radd", sampler={"scorer": str(tmp_path / "radd")})
        other.task.analyses["generative_perplexity"](run.params, run.extra, tmp_path, 8, 0)
