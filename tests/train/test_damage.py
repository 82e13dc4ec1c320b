"""A damaged checkpoint is reported, set aside and never trained on."""

import json
import pathlib
import random
import shutil
import subprocess

import command
import pytest

import scanax.train
from scanax.train.checkpoint import CheckpointError, Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A finished run with checkpoints at steps 20, 40 and 60."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = command.run_forked(command.train_command(workdir))
    assert result.returncode == 0, result.stdout
    return workdir


def copy(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def largest_file(step: pathlib.Path) -> pathlib.Path:
    """The file that holds the averaged parameters, which training and evaluation both read."""
    return max((step / "ema" / "d").iterdir(), key=lambda p: p.stat().st_size)


def truncate(step: pathlib.Path) -> None:
    path = largest_file(step)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(step: pathlib.Path) -> None:
    largest_file(step).unlink()


def empty(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def cut_metadata(step: pathlib.Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text()[:-40])


def change_metadata(step: pathlib.Path) -> None:
    """A whole JSON file with another data position in it."""
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["data"]["position"] = {"next_index": 1}
    path.write_text(json.dumps(meta))


DAMAGE = (truncate, remove, empty, cut_metadata, change_metadata)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_newest_damaged_continues_from_the_one_before(finished, tmp_path, damage, caplog):
    workdir = copy(finished, tmp_path)
    damage(workdir / "checkpoints" / "60")
    run = scanax.train.load(workdir)  # reads only: falls back, changes nothing
    assert run.step == 40
    assert (workdir / "checkpoints" / "60").exists()
    message = "\n".join(r.getMessage() for r in caplog.records if r.name == "scanax")
    assert "checkpoint 60 is damaged" in message
    with pytest.raises(CheckpointError, match="damaged"):
        scanax.train.load(workdir, step=60)


@pytest.mark.parametrize("damage", [truncate, empty], ids=lambda f: f.__name__)
def test_training_continues_and_ends_bitwise_the_same(finished, tmp_path, damage):
    workdir = copy(finished, tmp_path)
    damage(workdir / "checkpoints" / "60")
    result = command.run_forked(command.train_command(workdir))
    assert result.returncode == 0, result.stdout
    lines = [line for line in result.stdout.splitlines() if "is damaged" in line]
    assert len(lines) == 1 and "continuing from step 40" in lines[0]
    assert (workdir / "damaged" / "60").is_dir()
    assert _arrays(workdir) == _arrays(finished)


def test_any_flipped_bit_is_noticed(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    step = workdir / "checkpoints" / "60"
    read = [p for item in ("ema", "meta") for p in (step / item).rglob("*") if p.is_file()]
    generator = random.Random(0)
    for path in [*read, *read]:
        content = path.read_bytes()
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            assert scanax.train.load(workdir).step == 40, path
        finally:
            path.write_bytes(content)
    assert scanax.train.load(workdir).step == 60


def test_wrong_values_in_whole_files_are_noticed(finished, tmp_path, monkeypatch):
    """What the files cannot tell, the checksums of the arrays do."""
    workdir = copy(finished, tmp_path)
    monkeypatch.setattr(Checkpoints, "_check_files", lambda *_: None)
    step = workdir / "checkpoints" / "60"
    generator = random.Random(0)
    for _ in range(10):
        path = largest_file(step)
        content = path.read_bytes()
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(changed))
        assert scanax.train.load(workdir).step == 40
        path.write_bytes(content)


def test_files_are_listed_for_sha256sum(finished):
    folder = finished / "checkpoints" / "60"
    subprocess.run(["sha256sum", "-c", "--quiet", "files.sha256"], cwd=folder, check=True)
    assert len((folder / "files.sha256").read_text().splitlines()) > 10


def test_all_damaged_stops_and_changes_nothing(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    for step in (20, 40, 60):
        truncate(workdir / "checkpoints" / str(step))
    result = command.run_forked(command.train_command(workdir))
    assert result.returncode == 2, result.stdout
    assert "every checkpoint" in result.stdout and "Traceback" not in result.stdout
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["20", "40", "60"]


def test_other_data_position_is_refused(finished, tmp_path):
    """A checkpoint of one data order is not continued on another."""
    workdir = copy(finished, tmp_path)
    arguments = command.train_command(workdir, "--config.data.seed=5", "--allow_config_change")
    result = command.run_forked(arguments)
    assert result.returncode == 2, result.stdout
    assert "other data" in result.stdout and "seed: 0 -> 5" in result.stdout
    assert (workdir / "config.json").read_text() == (finished / "config.json").read_text()


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        scanax.train.load(tmp_path / "absent")


def test_step_that_does_not_exist_names_those_that_do(finished):
    with pytest.raises(CheckpointError, match=r"no step 7.*20, 40, 60"):
        scanax.train.load(finished, step=7)


def _arrays(workdir: pathlib.Path) -> dict:
    checkpoints = Checkpoints(workdir)
    _, meta = checkpoints.read_meta()
    checkpoints.close()
    return meta["arrays"]
