"""The converting command: published checkpoint -> run -> training -> published, and mistakes."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scanax.models import interop
from scanax.models.delta_product.interop import join_steps, split_steps
import scanax.train

CONFIG = "--config=configs/word_problem_s3.py"
SHORT = (
    "--config.num_steps=4",
    "--config.optimizer.warmup_steps=1",
    "--config.batch_size=4",
    "--config.data.length=8",
    "--config.data.curriculum_lengths=(8,)",
    "--config.data.curriculum_steps=(0,)",
    "--config.data.eval_lengths=(8,)",
    "--config.evaluation.batch_size=4",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return command.run_forked([sys.executable, "-m", *arguments])


def convert(source: pathlib.Path, target: pathlib.Path, *arguments: str):
    return run("scanax.models.interop", f"--from={source}", f"--to={target}", *arguments)


@pytest.fixture
def published(golden, tmp_path):
    """A golden model as a folder that could have been downloaded, its tensors and config."""
    arrays = np.load(golden / "deltaproduct/model_gated_nh2_2layer.npz")
    tensors = {n.removeprefix("param."): arrays[n] for n in arrays if n.startswith("param.")}
    config = json.loads(str(arrays["config"]))
    return write(tmp_path / "published", tensors, config), tensors, config


def write(folder: pathlib.Path, tensors, config) -> pathlib.Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_convert_train_convert_back(published, tmp_path):
    folder, tensors, config = published
    made = convert(folder, tmp_path / "run", CONFIG, *SHORT)
    assert made.returncode == 0, made.stdout
    start = scanax.train.load(tmp_path / "run")
    assert start.step == 0
    back = interop.to_torch("fla_delta_product", start.params, config)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)

    printed = shlex.split(made.stdout.strip().splitlines()[-1])
    trained = run(*printed[2:])
    assert trained.returncode == 0, trained.stdout
    end = scanax.train.load(tmp_path / "run")
    assert end.step == 4
    exported = convert(tmp_path / "run", tmp_path / "export")
    assert exported.returncode == 0, exported.stdout
    after = load_file(tmp_path / "export" / "model.safetensors")
    public = json.loads((tmp_path / "export" / "config.json").read_text())
    assert after.keys() == tensors.keys()
    assert any(not np.array_equal(after[name], tensors[name]) for name in tensors)
    module, params = interop.from_torch("fla_delta_product", after, public)
    jax.tree.map(np.testing.assert_array_equal, params, end.params)
    given = {k: v for k, v in config.items() if k in public and v is not None}
    assert {k: public[k] for k in given} == given
    ids = jnp.arange(6)[None]
    assert np.isfinite(module.apply({"params": params}, ids)[0]).all()


def test_naming_of_2025_and_back(published, tmp_path):
    _, tensors, config = published
    per_step, old_config = split_steps(tensors, config)
    name = "model.layers.1.attn.k_projs.1.weight"
    rows = tensors["model.layers.1.attn.k_proj.weight"]
    np.testing.assert_array_equal(per_step[name], rows[len(rows) // 2 :])
    assert "use_output_gate" not in old_config and old_config["use_gate"] is True
    assert {k: np.asarray(v).tobytes() for k, v in join_steps(per_step, old_config)[0].items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }
    new, old = (
        interop.from_torch(family, x, c)[1]
        for family, x, c in (
            ("fla_delta_product", tensors, config),
            ("official_delta_product", per_step, old_config),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, new, old)
    again = interop.to_torch("official_delta_product", old, old_config)
    assert again.keys() == per_step.keys()
    assert all(np.array_equal(again[k], per_step[k]) for k in again)

    old_folder = write(tmp_path / "old", per_step, old_config)
    result = convert(old_folder, tmp_path / "new", "--dtype=bfloat16")
    assert result.returncode == 0, result.stdout
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, tensors[key].astype(jnp.bfloat16), key)
    del per_step[name]
    with pytest.raises(ValueError, match=rf"num_householder=2, but tensor missing: {name}"):
        join_steps(per_step, old_config)


@pytest.mark.slow
def test_lightnet_run_to_published_and_back(tmp_path):
    """The family is found by the run's config, and by the tensors' names."""
    where = ("--config=configs/lightnet_lm_embedded.py", f"--workdir={tmp_path / 'run'}")
    small = ("--config.model.tpe=none", "--config.model.use_lrpe=false", "--config.num_steps=2")
    small += ("--config.optimizer.warmup_steps=1", "--config.data.length=16")
    small += ("--config.evaluation.batches=1", "--config.evaluation.samples=0")
    small += ("--config.model.hidden_size=16", "--config.batch_size=4")
    trained = run("scanax.train.main", *where, *small)
    assert trained.returncode == 0, trained.stdout
    exported = convert(tmp_path / "run", tmp_path / "export")
    assert exported.returncode == 0, exported.stdout
    again = convert(tmp_path / "export", tmp_path / "again")
    assert again.returncode == 0, again.stdout
    public = json.loads((tmp_path / "again" / "config.json").read_text())
    assert public["model_type"] == "lightnet"
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    assert "model.layers.1.attn.g_proj.0.weight" in tensors
    _, params = interop.from_torch("fla_lightnet", tensors, public)
    end = scanax.train.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, params, end.params)
    wrong = convert(tmp_path / "run", tmp_path / "no", "--to_family=fla_delta_product")
    assert wrong.returncode == 2 and "must be one of fla_lightnet" in wrong.stdout, wrong.stdout
    wrong = convert(tmp_path / "export", tmp_path / "no", CONFIG)
    assert wrong.returncode == 2 and "is of family delta_product" in wrong.stdout, wrong.stdout


def test_mistakes(published, tmp_path):
    folder, tensors, config = published
    missing = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    incomplete = write(tmp_path / "incomplete", missing, config)
    damaged = write(tmp_path / "damaged", tensors, config)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:1000])
    empty = tmp_path / "empty"
    empty.mkdir()
    new = tmp_path / "new"
    cases = [
        ((incomplete, new), r"tensor missing: model\.layers\.0\.attn\.o_norm\.weight"),
        ((damaged, new), "model.safetensors cannot be read"),
        ((empty, new), "has no config.json"),
        ((folder, folder), "give a new folder"),
        (
            (folder, new, "--config=configs/digits_mlp.py"),
            "is of family mlp, --from of fla_delta_product",
        ),
    ]
    for arguments, message in cases:
        result = convert(*arguments)
        assert result.returncode == 2, result.stdout
        assert re.search(message, result.stdout), result.stdout
        assert "Traceback" not in result.stdout and not new.exists()


@pytest.mark.slow
def test_diffusion_model_becomes_a_flow(golden, tmp_path, monkeypatch):
    """EDM's network -> run -> pairs by EDM's sampler -> one update of 2-RF++ -> published again."""
    with np.load(golden / "rectflow" / "edmnet_songunet_ncsnpp.npz") as arrays:
        tensors = {n[3:]: arrays[n] for n in arrays if n[:3] in ("w::", "b::")}
        config = json.loads(str(arrays["config_json"]))
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    folder = write(tmp_path / "published", tensors, config)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (40, 16, 16, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(40) % 5)
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    small = (
        "--config=configs/flow_rfpp.py:cifar10",
        "--config.data.path=x.npy",
        "--config.data.eval_path=",
        "--config.data.labels_path=labels.npy",
        "--config.objective.distance_size=",
        "--config.num_steps=1",
        "--config.optimizer.warmup_steps=0",
        "--config.batch_size=4",
        "--config.evaluation.batches=1",
        "--config.evaluation.batch_size=4",
        "--config.evaluation.samples=0",
    )
    made = convert(folder, tmp_path / "edm", *small)
    assert made.returncode == 0, made.stdout
    assert "--config.model.num_classes=5" in made.stdout
    start = scanax.train.load(tmp_path / "edm")
    back = interop.to_torch("edm_songunet", start.params, config)
    assert all(np.array_equal(back[name], x) for name, x in tensors.items() if name in back)

    where = (f"--workdir={tmp_path / 'edm'}", f"--out={tmp_path / 'pairs'}", "--recipe=edm_heun:2")
    pairs = run("scanax.train.generate_pairs", *where, "--num=12", "--batch_size=6")
    assert pairs.returncode == 0, pairs.stdout
    printed = [x for x in shlex.split(made.stdout.strip().splitlines()[-1]) if "workdir" not in x]
    ends = (f"--config.init_from={tmp_path / 'edm'}", f"--config.data.pairs={tmp_path / 'pairs'}")
    trained = run(*printed[2:], *ends, f"--workdir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stdout
    exported = convert(tmp_path / "run", tmp_path / "export")
    assert exported.returncode == 0, exported.stdout
    after = load_file(tmp_path / "export" / "model.safetensors")
    _, params = interop.from_torch(
        "edm_songunet", after, json.loads((tmp_path / "export" / "config.json").read_text())
    )
    jax.tree.map(np.testing.assert_array_equal, params, scanax.train.load(tmp_path / "run").params)


def test_published_masked_diffusion_and_back(golden, tmp_path, monkeypatch):
    """RADD's network -> run -> gaps filled -> published again, the same to the bit."""
    with np.load(golden / "radd" / "radd_tiny.npz") as arrays:
        tensors = {n.removeprefix("param/"): arrays[n] for n in arrays if n[:6] == "param/"}
    tensors.pop("rotary_emb.inv_freq")
    config = {"tokens": 12, "model": {"hidden_size": 32, "n_blocks": 2, "n_heads": 4}}
    folder = write(tmp_path / "published", tensors, config)
    (tmp_path / "text.txt").write_text("abcdefghij" * 40)  # and two for unknown and end
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    data = {"source": "files", "path": "text.txt", "tokenizer": "char", "holdout": "tail"}
    data |= {"length": 16, "end_of_document": False}
    options = [f"--config.data.{name}={value}" for name, value in data.items()]
    made = convert(folder, tmp_path / "run", "--config=configs/radd_lm_embedded.py", *options)
    assert made.returncode == 0, made.stdout
    filled = run("scanax.train.sample", f"--workdir={tmp_path / 'run'}", "--infill=abc[[4]]hij")
    assert filled.returncode == 0, filled.stdout
    assert re.search(r"^abc.{4}hij$", filled.stdout, re.MULTILINE), filled.stdout
    exported = convert(tmp_path / "run", tmp_path / "export")
    assert exported.returncode == 0, exported.stdout
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(np.array_equal(after[name], x) for name, x in tensors.items())
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tokens"] == 12

    other = [x.replace("text.txt", "other.txt") for x in options]
    (tmp_path / "other.txt").write_text("abcd" * 100)
    refused = convert(folder, tmp_path / "no", "--config=configs/radd_lm_embedded.py", *other)
    assert (
        refused.returncode == 2 and "model.vocab_size (13) must be the 6 tokens" in refused.stdout
    )
