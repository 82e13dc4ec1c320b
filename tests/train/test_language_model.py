"""Language models beyond training: continuing texts, and loss and state over long texts."""

import itertools
import json

import command
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scanax.configs import base
from scanax.models.generation import Sampling
from scanax.train import long_context, plots, tasks
from scanax.train.config import from_dict
from scanax.train.data.pipeline import DataError

SMALL = {
    "batch_size": 4,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.num_hidden_layers": 2,
    "model.intermediate_size": 16,
    "model.initializer_range": 0.3,
    "data.source": "files",
    "data.path": "text.txt",
    "data.holdout": "tail",
    "data.length": 16,
    "mesh.data": 1,
}
GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def build(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))

    def build(**changes):
        values = base.get_config("language_model")
        values.update_from_flattened_dict({**SMALL, **changes})
        task = tasks.build(from_dict(values.to_dict()))
        return task, *task.init(jax.random.key(0))

    return build


def test_texts_are_continued(build):
    task, params, extra = build()
    options = {"sampling": GREEDY, "max_tokens": 6}
    texts = ["the cat", "on", ""]
    found = task.complete(params, extra, jax.random.key(0), texts, **options)
    assert found.prompt_tokens == 7 + 2 + 1 and [len(t) for t in found.tokens] == [6, 6, 6]
    assert isinstance(task.decode(found.tokens[0]), str)
    end = int(found.tokens[0][2])
    stop = bytes([end]).decode("latin-1") if end < 128 else None
    if stop is not None:
        cut = task.complete(params, extra, jax.random.key(0), texts, stops=[stop], **options)
        assert cut.stopped[0] and len(cut.tokens[0]) <= 2


def test_characters_without_a_token_are_named(build):
    task, params, extra = build(**{"data.tokenizer": "char"})
    with pytest.raises(DataError, match="no token for '7', 'Z': write"):
        task.complete(params, extra, jax.random.key(0), ["the Z7"], sampling=GREEDY, max_tokens=2)


def test_long_context_is_the_loss_of_the_whole_row(build, tmp_path):
    """Streamed in chunks of 16, it is what one forward over all 96 tokens gives."""
    task, params, extra = build()
    folder = tmp_path / "run" / "eval" / "00000001" / "long_context"
    text = task.analyses["long_context"](params, extra, folder, 3, 100)
    assert "0 to      16" in text and "64 to      96" in text and "bits per byte" in text
    assert (folder / "rank.png").stat().st_size > 5000
    curve = plots.read_curve(tmp_path / "run", "long_context")
    figures = json.loads((folder / "figures.json").read_text())

    tail = ("the cat sat on the mat. " * 200)[-480:].encode()  # the held-out tenth
    rows = np.stack([np.frombuffer(tail[i * 96 : i * 96 + 97], np.uint8) for i in range(3)])
    logits = whole(task, params, rows[:, :-1].astype(np.int32))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:].astype(np.int32))
    bits = np.asarray(loss).mean(axis=0) / np.log(2)
    edges = long_context.bin_edges(96)
    expected = [bits[a:b].mean() for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(curve["y"], expected, rtol=2e-5)
    np.testing.assert_allclose(figures["64-96"], bits[64:].mean(), rtol=2e-5)
    assert np.shape(figures["rank"]) == (2, 2)
    with pytest.raises(DataError, match="--length must be 16 to 480 tokens"):
        task.analyses["long_context"](params, extra, folder, 1, 1000)


def whole(task, params, ids):
    """Logits of one forward, through the task's own loss at every prefix being one batch."""
    from scanax.models.delta_product import DeltaProductConfig, DeltaProductLM

    model = base.get_config("language_model").model.to_dict()
    model |= {k.removeprefix("model."): v for k, v in SMALL.items() if k.startswith("model.")}
    config = DeltaProductConfig(**{**model, "vocab_size": 257})
    return DeltaProductLM(config).apply({"params": params}, ids)[0]


def test_effective_rank():
    diagonal = jnp.stack([jnp.eye(4), jnp.diag(jnp.asarray([1.0, 1, 0, 0])), jnp.zeros((4, 4))])
    rank = long_context.effective_rank(diagonal)
    np.testing.assert_allclose(rank, [4, 2, 1], rtol=1e-5)
    mixed = long_context.effective_rank(jnp.diag(jnp.asarray([0.75, 0.25, 0, 0])))
    np.testing.assert_allclose(mixed, 2 ** (2 - 0.75 * np.log2(3)), rtol=1e-5)


def test_command_lines(build, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    overrides = [f"--config.{k}={v}" for k, v in SMALL.items() if not k.startswith("mesh")]
    short = ("--config.num_steps=4", "--config.optimizer.warmup_steps=1")
    arguments = ("--config=configs/lm_embedded.py", f"--workdir={workdir}", *overrides, *short)
    trained = command.run_forked(
        command.command("main", *arguments, "--config.evaluation.samples=1")
    )
    assert trained.returncode == 0, trained.stdout
    sample = lambda *more: command.run_forked(
        command.command("sample", f"--workdir={workdir}", *more)
    )
    prompts = ("--prompt=the cat", f"--prompt_file={tmp_path / 'prompt.txt'}")
    (tmp_path / "prompt.txt").write_text("on the\n")
    found = sample(*prompts, "--num=2", "--max_tokens=5", "--top_p=0.9", "--ignore_end")
    assert found.returncode == 0, found.stdout
    assert found.stdout.count("--- prompt") == 4 and "prompt 1, sample 1: 5" in found.stdout
    assert "tokens/s" in found.stdout and "prompts: 28 tokens" in found.stdout
    for wrong, message in (
        (["--prompt="], "a prompt is empty"),
        (["--prompt_file=absent.txt"], "absent.txt cannot be read"),
        (["--prompt=a", "--top_p=0"], "--top_p must be in (0, 1], got 0.0"),
    ):
        result = sample(*wrong)
        assert result.returncode == 2 and message in result.stdout, result.stdout
        assert "Traceback" not in result.stdout
    evaluate = command.command("evaluate", f"--workdir={workdir}", "--analysis=routing")
    result = command.run_forked(evaluate)
    assert result.returncode == 2 and "it has long_context" in result.stdout
