"""A run that is killed and started again ends bitwise where an undisturbed run ends."""

import json
import pathlib
import random
import shutil
import signal

import command
import numpy as np
import pytest

from scanax.train.checkpoint import Checkpoints

# Many saves and a run of several seconds, so that kills land everywhere: in imports, in
# compilation, between steps, in the middle of a save.
OVERRIDES = (
    "--config.num_steps=600",
    "--config.checkpoint.every_steps=15",
    "--config.evaluation.every_steps=200",
)


def arrays(workdir: pathlib.Path) -> dict:
    """Shape, dtype and checksum of every array of the newest checkpoint."""
    checkpoints = Checkpoints(workdir)
    _, meta = checkpoints.read_meta()
    checkpoints.close()
    return meta["arrays"]


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without the timings."""
    parsed = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in parsed]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = command.run(command.train_command(workdir, *OVERRIDES))
    assert result.returncode == 0, result.stdout
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_ends_bitwise_the_same(undisturbed, tmp_path, with_signal):
    generator = random.Random(int(with_signal))
    workdir = tmp_path / "run"
    arguments = command.train_command(workdir, *OVERRIDES)
    codes = []
    for _ in range(8 if with_signal == signal.SIGKILL else 4):
        # Counted from the start; a process imports for about 3 s before it trains.
        codes.append(command.interrupt(arguments, generator.uniform(2.0, 7.0), with_signal))
    assert -signal.SIGKILL in codes or with_signal == signal.SIGTERM
    result = command.run(arguments)
    assert result.returncode == 0, result.stdout
    assert arrays(workdir) == arrays(undisturbed)
    assert rows(workdir) == rows(undisturbed)


def test_sigterm_saves_before_it_exits(tmp_path):
    """A step far from any scheduled save is there after SIGTERM; the exit code says why."""
    workdir = tmp_path / "run"
    overrides = ("--config.num_steps=100000", "--config.checkpoint.every_steps=100000")
    arguments = command.train_command(workdir, *overrides)
    code = command.interrupt(arguments, 12.0, signal.SIGTERM)
    assert code == 143
    assert Checkpoints(workdir).steps()


def test_killed_while_saving_leaves_no_rubbish(undisturbed, tmp_path):
    """What a kill in the middle of a save leaves behind is ignored and cleaned up."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    half = workdir / "checkpoints" / "700.orbax-checkpoint-tmp-1234"
    shutil.copytree(workdir / "checkpoints" / "600", half)
    (half / "meta" / "metadata").unlink()
    result = command.run(command.train_command(workdir, *OVERRIDES))
    assert result.returncode == 0, result.stdout
    assert arrays(workdir) == arrays(undisturbed)
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_finished_run_stays_as_it_is(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    result = command.run(command.train_command(workdir, *OVERRIDES))
    assert result.returncode == 0, result.stdout
    assert arrays(workdir) == arrays(undisturbed)
    assert rows(workdir) == rows(undisturbed)


def test_resume_on_another_mesh(undisturbed, tmp_path):
    """Half the run on one device, the rest on four: the same losses to float32 rounding."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    checkpoints.close()
    for step in steps[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    result = command.run(
        command.train_command(workdir, *OVERRIDES, "--config.mesh.fsdp=2"), devices=4
    )
    assert result.returncode == 0, result.stdout
    assert f"continuing from step {steps[0]}" in result.stdout
    losses = [np.asarray([r["loss"] for r in rows(w)]) for w in (workdir, undisturbed)]
    np.testing.assert_allclose(*losses, rtol=2e-4)
