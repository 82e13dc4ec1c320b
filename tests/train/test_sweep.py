"""Sweeps: grids, tables, mistakes, and one that is interrupted and goes on."""

import json
import signal
import subprocess
import time

import command
import pytest

from scanax.configs import base
from scanax.train.config import ConfigError
from scanax.train.evaluation import Condition
from scanax.train.sweep import expand, parse_axis, share, table

GRID = ("--grid=model.num_householder=1,2", "--solved=sequence_accuracy_8>=0")


def sweep_command(workdir, *arguments: str) -> list[str]:
    flags = (f"--config={command.CONFIG}", f"--workdir={workdir}", *command.SMALL)
    return command.command("sweep", *flags, *arguments)


def runs(root, tmp_path, *axes: str, seeds: int = 1):
    parsed = [parse_axis(text) for text in axes]
    file = str(root / "configs" / "word_problem_s3.py")
    return expand(file, base.get_config("word_problem"), parsed, seeds, tmp_path)


def test_every_combination_and_seed_has_its_config_and_folder(root, tmp_path):
    found = runs(
        root,
        tmp_path,
        "model.allow_neg_eigval=true,False",
        "data.eval_lengths=(8,16),(8,)",
        "optimizer.learning_rate=1e-3,2",
        seeds=2,
    )
    assert len(found) == len({run.folder for run in found}) == 16
    last = found[-1]
    assert last.config.seed == last.config.data["seed"] == 1
    assert last.config.data["eval_lengths"] == (8,) and last.config.optimizer.learning_rate == 2
    assert not last.config.model["allow_neg_eigval"]
    assert "--config.optimizer.learning_rate=2.0" in last.command
    assert found[0].label == "allow_neg_eigval=True,eval_lengths=(8,16),learning_rate=0.001"


def test_keys_that_change_together(root, tmp_path):
    found = runs(root, tmp_path, "model.num_householder:model.num_heads=1:6,  2:4", "seed=3,4")
    sizes = [(run.config.model["num_householder"], run.config.model["num_heads"]) for run in found]
    assert sizes == [(1, 6), (1, 6), (2, 4), (2, 4)]
    assert found[1].label == "num_householder=1,num_heads=6,seed=4"


@pytest.mark.parametrize(
    "axis, message",
    [
        ("model.num_housholder=1", "did you mean 'model.num_householder'"),
        ("model.num_householder=one", "'one' is not of type int"),
        ("model.allow_neg_eigval=maybe", "not of type bool"),
        ("model.num_householder", "KEY=VALUE"),
        ("model.num_householder=1,", "KEY=VALUE"),
        ("model.num_householder=1,1", "twice"),
        ("model.num_householder:model.num_heads=1,2", "KEY:KEY"),
        ("seed:seed=1:2", "twice"),
        ("model.num_householder=0", "at least 1"),
        ("data.group=S9", "choose one of"),
    ],
)
def test_wrong_grids(root, tmp_path, axis, message):
    with pytest.raises(ConfigError, match=message):
        runs(root, tmp_path, axis)
    assert not list(tmp_path.iterdir())


def test_table_counts_solved_seeds_and_gives_the_spread():
    results = [
        {"cell": {"model.n": n}, "seed": seed, "accuracy": value, "step": 5}
        for n, seed, value in ((1, 0, 0.25), (1, 1, 0.75), (2, 0, 1.0), (2, 1, 1.0))
    ]
    results += [{"cell": {"model.n": n}, "seed": 2, "failed": True} for n in (2, 3)]
    lines = table(results, ["accuracy"], Condition.parse("accuracy>=0.5")).splitlines()
    assert lines[0] == "| n | solved | accuracy |"
    assert lines[2:] == [
        "| 1 | 1 of 2 | 0.5 (0.25 to 0.75) |",
        "| 2 | 2 of 3 (1 failed) | 1 |",
        "| 3 | 0 of 1 (1 failed) | - |",
    ]


def test_jobs_share_cores():
    assert [share(range(5), slot, 2) for slot in range(2)] == [range(0, 5, 2), range(1, 5, 2)]
    assert [share([0, 1], slot, 3) for slot in range(3)] == [[0], [1], [0]]


@pytest.mark.parametrize("text", ["accuracy", "accuracy>0.5", "a b>=1", "accuracy>=-"])
def test_wrong_conditions(text):
    with pytest.raises(ConfigError, match="METRIC>=NUMBER"):
        Condition.parse(text)


def test_conditions():
    assert Condition.parse("loss <= 1e-1").met({"loss": 0.1})
    assert not Condition.parse("loss<=1").met({"loss": float("nan")})
    assert Condition.parse("a>=0.5").met({"a": 0.5}) and not Condition.parse("a>=.5").met(
        {"a": 0.4}
    )


def test_runs_end_when_they_have_reached_their_goal(tmp_path):
    stop = ("--config.evaluation.every_steps=20", "--config.evaluation.stop_when=token_accuracy>=0")
    result = command.run(sweep_command(tmp_path / "sweep", "--solved=token_accuracy>=0", *stop))
    assert result.returncode == 0, result.stdout
    (row,) = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert row["step"] == 0 and "| 1 of 1 |" in (tmp_path / "sweep" / "table.md").read_text()


def test_runs_that_fail_are_named_and_counted(tmp_path):
    diverge = "--grid=optimizer.learning_rate=1e-3,1e38"
    result = command.run(sweep_command(tmp_path, diverge, "--solved=token_accuracy>=0"))
    assert result.returncode == 1, result.stdout
    assert "1 of 2 runs failed" in result.stdout and "Traceback" not in result.stdout
    assert "| 1e+38 | 0 of 1 (1 failed) |" in (tmp_path / "table.md").read_text()
    unknown = command.run(sweep_command(tmp_path, diverge, "--metrics=accuracy"))
    assert unknown.returncode == 2 and "there is no metric 'accuracy'" in unknown.stdout


def test_goal_that_is_no_metric(tmp_path):
    stop = ("--config.evaluation.every_steps=20", "--config.evaluation.stop_when=accuracy>=0.9")
    result = command.run(command.train_command(tmp_path / "run", *stop))
    assert result.returncode == 2 and "there is no metric 'accuracy'" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_interrupted_sweep_goes_on_where_it_was(tmp_path):
    arguments = sweep_command(tmp_path, *GRID, "--config.num_steps=400")
    first = tmp_path / "num_householder=1"
    process = subprocess.Popen(arguments, cwd=command.ROOT, env=command.environment())
    deadline = time.monotonic() + 120
    while not list(first.glob("seed_0/checkpoints/*20")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert not (tmp_path / "num_householder=2").exists()

    result = command.run(arguments)
    assert result.returncode == 0, result.stdout
    log = (first / "seed_0.log").read_text()
    assert "SIGTERM received" in log and "continuing from step" in log
    assert "num_householder=2 seed 0: done" in result.stdout
    assert (tmp_path / "curves.png").stat().st_size > 5000
    again = command.run(arguments)
    assert again.returncode == 0 and "2 of them done" in again.stdout
    assert "started" not in again.stdout
