"""The tasks on real data: packed documents, metrics, samples, resuming, and mistakes."""

import itertools
import json
import pathlib
import random
import signal

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import base
from scanax.train import evaluation, loop, tasks
from scanax.train.checkpoint import Checkpoints
from scanax.train.config import Config, ConfigError, from_dict
from scanax.train.data import tokenizer as tokenizers
from scanax.train.data.pipeline import IGNORE
from scanax.train.data.text import hold_out

SMALL = {
    "num_steps": 40,
    "batch_size": 8,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.intermediate_size": 16,
    "data.length": 32,
    "evaluation.batch_size": 16,
    "mesh.data": 1,
}
DOCUMENTS = [f"document {i} " + "ab" * (i % 5) for i in range(24)]
KEYS = ("ids", "segments", "labels")


def config(name: str = "language_model", **changes) -> Config:
    values = base.get_config(name)
    known = {key: value for key, value in SMALL.items() if name == "language_model"}
    values.update_from_flattened_dict({**known, "mesh.data": 1, **changes})
    return from_dict(values.to_dict())


@pytest.fixture
def documents(tmp_path, monkeypatch) -> pathlib.Path:
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i:02d}.txt").write_text(document)
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    return tmp_path


def packed(documents, **changes) -> Config:
    files = {"data.source": "files", "data.path": "*.txt", "data.layout": "packed"}
    return config(**{**files, "data.eval_fraction": 0.3, **changes})


def test_packed_and_separate_rows_give_the_same_loss(documents):
    """Segments reach the convolutions and the scan: documents do not see each other."""
    task = tasks.build(packed(documents, **{"data.length": 64, "evaluation.batch_size": 2}))
    params, _ = task.init(jax.random.key(0))
    evaluate = jax.jit(lambda batch: task.evaluate(params, {}, batch, None)["loss"])
    together, separate, most = np.zeros(2), np.zeros(2), 0
    for batch in iter_batches(task):
        together += evaluate(batch)
        for ids, segments, labels in zip(*(batch[n] for n in KEYS), strict=True):
            if (labels == IGNORE).all():
                continue  # fills the last batch up
            most = max(most, segments.max())
            for number in range(1, segments.max() + 1):
                document = ids[segments == number]
                rows = {name: np.zeros((2, 64), np.int32) for name in KEYS}
                rows["labels"] -= 1
                rows["ids"][0, : len(document)] = document
                rows["labels"][0, : len(document) - 1] = document[1:]
                separate += evaluate(rows)
    assert most > 1, "nothing was packed"
    np.testing.assert_allclose(together, separate, rtol=2e-6)
    assert together[1] == sum(len(d) for d in hold_out(DOCUMENTS, "hash", 0.3)[1])


def iter_batches(task):
    """All evaluation batches."""
    for index in itertools.count():
        if (batch := task.eval_data(index)) is None:
            return
        yield batch


def test_bits_per_byte_and_weights():
    """The whole evaluation text, every token once; bytes cost bits, the end token no byte."""
    c = config(**{"evaluation.batches": 0, "data.length": 64})
    task = tasks.build(c)
    mesh, _ = loop.place(task, c)
    params, extra = task.init(jax.random.key(0))
    means = evaluation.make_evaluator(task, c, mesh)(params, extra)
    labels = np.concatenate([batch["labels"].ravel() for batch in iter_batches(task)])
    labels = labels[labels != IGNORE]
    ratio = len(labels) / (labels != tokenizers.Bytes.end).sum()
    np.testing.assert_allclose(means["bits_per_byte"], means["loss"] / np.log(2) * ratio, rtol=1e-5)
    assert abs(means["loss"] - np.log(257)) < 0.3


def test_samples_are_a_function_of_the_key():
    task = tasks.build(config())
    params, extra = task.init(jax.random.key(0))
    one, same, other = (task.sample(params, extra, jax.random.key(i), 3) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (3, 32) and (one != other).any() and 0 <= one.min() <= one.max() < 257
    assert task.render(one).count("---") == 6


def test_soft_targets_reach_the_loss():
    c = config("image_classification", **{"data.channels": 1, "data.mixup": 0.8})
    task = tasks.build(c)
    params, extra = task.init(jax.random.key(0))
    batch = {name: jnp.asarray(x) for name, x in next(task.train_data(0, 1)).items()}
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in task.batch_spec.items()
    }
    soft, _ = task.loss(params, extra, batch, None)
    hard, _ = task.loss(params, extra, {k: batch[k] for k in ("images", "labels")}, None)
    assert abs(float(soft) - float(hard)) > 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.vocab_size": 100}, "smaller than the 257 tokens of data.tokenizer byte"),
    ],
)
def test_text_and_model_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        tasks.build(config(**changes))


FLAGS = {
    "configs/lm_embedded.py": (
        "--config.num_steps=40",
        "--config.data.length=32",
        "--config.model.hidden_size=16",
        "--config.model.num_hidden_layers=1",
        "--config.model.num_heads=2",
        "--config.model.head_dim=8",
        "--config.model.intermediate_size=16",
        "--config.optimizer.warmup_steps=5",
        "--config.evaluation.batches=1",
        "--config.evaluation.every_steps=0",
    ),
    "configs/digits_mlp.py": (
        "--config.num_steps=120",
        "--config.data.flip",
        "--config.data.mixup=0.8",
        "--config.data.rand_augment=1",
        "--config.data.dequantise",
    ),
}


def train_command(name: str, workdir: pathlib.Path, *more: str) -> list[str]:
    flags = (f"--config={name}", f"--workdir={workdir}", "--config.checkpoint.every_steps=10")
    return command.command("main", *flags, *FLAGS[name], *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_killed_run_on_real_data_ends_bitwise_the_same(name, tmp_path):
    result = command.run_forked(train_command(name, tmp_path / "quiet"))
    assert result.returncode == 0, result.stdout
    generator = random.Random(name)
    arguments = train_command(name, tmp_path / "killed")
    for _ in range(2):
        command.interrupt(arguments, generator.uniform(4.0, 8.0), signal.SIGKILL)
    result = command.run_forked(arguments)
    assert result.returncode == 0, result.stdout
    found = []
    for workdir in ("quiet", "killed"):
        checkpoints = Checkpoints(tmp_path / workdir)
        step, meta = checkpoints.read_meta()
        checkpoints.close()
        found.append((step, meta["arrays"], meta["data"]))
    assert found[0] == found[1]


def test_changed_data_is_refused_until_allowed(tmp_path):
    workdir = tmp_path / "run"
    (tmp_path / "data").mkdir()
    text = tmp_path / "data" / "a.txt"
    text.write_text("some text " * 400)
    files = ("--config.data.source=files", f"--config.data.path={text}")
    files += ("--config.data.holdout=tail", "--config.num_steps=6")
    arguments = train_command("configs/lm_embedded.py", workdir, *files)
    assert command.run_forked(arguments).returncode == 0
    text.write_text("other text " * 400)
    arguments += ["--config.num_steps=8", "--allow_config_change"]
    result = command.run_forked(arguments)
    assert result.returncode == 2, result.stdout
    assert "other data: fingerprint:" in result.stdout and "--allow_data_change" in result.stdout
    result = command.run_forked([*arguments, "--allow_data_change"])
    assert result.returncode == 0 and "continuing from step 6" in result.stdout, result.stdout


def test_missing_data_is_one_message_and_nothing_is_written(tmp_path):
    workdir = tmp_path / "run"
    files = ("--config.data.source=files", "--config.data.path=absent.txt")
    result = command.run_forked(train_command("configs/lm_embedded.py", workdir, *files))
    assert result.returncode == 2, result.stdout
    assert result.stdout.count("error:") == 1 and "absent.txt does not exist" in result.stdout
    assert "Traceback" not in result.stdout and not workdir.exists()


def test_benchmark_reports_what_the_data_costs():
    arguments = command.command(
        "benchmark", "--config=configs/digits_mlp.py", "--data_only", "--steps=3"
    )
    result = command.run_forked(arguments)
    assert result.returncode == 0, result.stdout
    values = json.loads(result.stdout.splitlines()[-1])["data"]
    assert values["batch_ms"] > 0 and 0 <= values["waiting_share_of_step"] <= 1
