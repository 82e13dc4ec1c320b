"""Wrong command lines: exit code 2, one clear message, nothing written, and soon."""

import json
import time

import command
import pytest

MISTAKES = {
    "key": (["--config.modle.hidden_size=1"], "did you mean 'model.hidden_size'"),
    "leaf": (["--config.model.hiden_size=1"], "did you mean 'model.hidden_size'"),
    "group": (["--config.model=3"], "group of keys"),
    "type": (["--config.batch_size=many"], "many"),
    "float for int": (["--config.num_steps=1.5"], "1.5"),
    "switch": (["--config.model.use_short_conv", "false"], "unexpected argument 'false'"),
    "flag": (["--workdri=x"], "workdir"),
    "heads": (["--config.model.num_v_heads=3"], "model.num_v_heads (3) must be a multiple"),
    "activation": (["--config.model.activation=gelu"], "silu, identity"),
    "mesh": (["--config.mesh.data=64"], "needs 64 devices, but there are 1"),
    "microbatches": (["--config.microbatches=3"], "must be a multiple of microbatches"),
    "batch": (["--config.mesh.data=1", "--config.batch_size=0"], "batch_size must be at least 1"),
    "group name": (["--config.data.group=S9"], "choose one of S3, S4, A5, S5"),
    "curriculum": (["--config.data.curriculum_lengths=(16,999)"], "data.curriculum_lengths"),
    "schedule": (["--config.optimizer.schedule=cosin"], "constant, cosine, wsd"),
    "warmup": (["--config.optimizer.warmup_steps=99"], "warmup_steps (99) exceeds num_steps (60)"),
    "task": (["--config.task=word_problems"], "unknown task 'word_problems'"),
    "family": (["--config.family=lightnet"], "choose a config file of that family"),
    "vocabulary": (["--config.model.vocab_size=5"], "smaller than the 13 tokens"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    start = time.monotonic()
    result = command.run_forked(command.train_command(workdir, *arguments))
    assert result.returncode == 2, result.stdout
    assert message in result.stdout
    assert result.stdout.count("error:") == 1 and "Traceback" not in result.stdout
    assert not workdir.exists()
    assert time.monotonic() - start < 60  # 15 s on an idle machine; tests share theirs


def test_config_file_that_does_not_exist(tmp_path):
    workdir = tmp_path / "run"
    arguments = command.command("main", "--config=configs/nope.py", f"--workdir={workdir}")
    result = command.run(arguments)
    assert result.returncode == 2
    assert "configs/word_problem_s3.py" in result.stdout and "Traceback" not in result.stdout
    assert not workdir.exists()


def test_workdir_of_another_run(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"num_steps": 7}))
    result = command.run(command.train_command(workdir))
    assert result.returncode == 2
    assert "another config" in result.stdout
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def test_workdir_that_is_not_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    result = command.run(command.train_command(tmp_path))
    assert result.returncode == 2
    assert "is not empty and holds no run" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("module", ["main", "evaluate", "sample"])
def test_missing_workdir_flag(module):
    result = command.run(command.command(module))
    assert result.returncode == 2
    assert "is required" in result.stdout and "Traceback" not in result.stdout


def test_evaluate_and_sample_from_a_checkpoint_alone(tmp_path):
    workdir = tmp_path / "run"
    trained = command.run(command.train_command(workdir, "--config.log.profile_start=10"))
    assert trained.returncode == 0, trained.stdout
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert list((workdir / "tensorboard").glob("events*"))
    evaluated = command.run(command.command("evaluate", f"--workdir={workdir}", "--step=40"))
    assert evaluated.returncode == 0, evaluated.stdout
    assert "sequence_accuracy_12" in evaluated.stdout
    folder = workdir / "eval" / "00000040"
    assert (folder / "curve.png").stat().st_size > 5000
    assert (folder / "samples.txt").read_text().startswith("0 of 4 words")
    sampled = command.run(command.command("sample", f"--workdir={workdir}", "--num=3"))
    assert sampled.returncode == 0 and "of 3 words" in sampled.stdout, sampled.stdout


def test_dry_run_prints_cost_and_writes_nothing(tmp_path):
    workdir = tmp_path / "run"
    arguments = command.train_command(workdir, "--dry_run", "--config.mesh.fsdp=2")
    result = command.run(arguments, devices=4)
    assert result.returncode == 0, result.stdout
    for expected in ("'data': 2, 'fsdp': 2", "parameters", "FLOPs", "MiB", "fsdpxtensor"):
        assert expected in result.stdout
    assert not workdir.exists()


def test_divergence_stops_and_keeps_what_was_good(tmp_path):
    """An absurd learning rate: skipped updates are counted, the run stops and says where."""
    workdir = tmp_path / "run"
    arguments = command.train_command(workdir, "--config.optimizer.learning_rate=1e38")
    result = command.run(arguments)
    assert result.returncode == 1, result.stdout
    assert "10 updates in a row were not finite" in result.stdout
    assert "Traceback" not in result.stdout
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["bad_steps"] >= 9
