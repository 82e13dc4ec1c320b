"""Coupling pairs: whole after a kill, bound to their teacher, never shuffled."""

import json
import pathlib
import signal

import chex
import command
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import flow_toy
from scanax.train import generate_pairs, run as run_lib
from scanax.train.config import ConfigError
from scanax.train.data import pairs as pairs_lib
from scanax.train.data.pipeline import DataError
from scanax.train.tasks.flow import flow_of

TINY = {
    "num_steps": 3,
    "batch_size": 16,
    "model.hidden_size": 8,
    "evaluation.batches": 1,
    "evaluation.batch_size": 8,
    "evaluation.samples": 0,
    "mesh.data": 1,
}


pytestmark = pytest.mark.usefixtures("standard_promotion")


def plan(**changes) -> pairs_lib.PairsPlan:
    values = {
        "teacher": "0" * 16,
        "run": "runs/x, step 1",
        "solver": "euler:1",
        "seed": 0,
        "batch_size": 2,
        "shape": (3,),
        "num_classes": 10,
        "number": 10,
        "per_shard": 4,
        "from_data": False,
    }
    return pairs_lib.PairsPlan(**{**values, **changes})


def make(numbers):
    """Pair i is (i, -i) with label i and i + 1 evaluations."""
    for i in numbers.tolist():
        yield np.full(3, i, np.float32), np.full(3, -i, np.float32), i, i + 1


def shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """That are whole."""
    found = sorted(folder.rglob("*.array_record-*"))
    return [path for path in found if path.suffix != ".tmp"]


def contents(folder: pathlib.Path) -> tuple[int, dict[str, np.ndarray]]:
    """All pairs, their checksums checked; how files lay them out is the writer's business."""
    found = pairs_lib.Pairs(str(folder))
    return len(found), dict(found.batch(np.arange(len(found)), np.arange(len(found))))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "run"
    config = flow_toy.get_config()
    config.update_from_flattened_dict(TINY)
    run_lib.train(config, folder)
    return folder


def generate(teacher, out, *flags):
    options = ("--num=40", "--per_shard=8", "--batch_size=4", "--recipe=euler:4")
    arguments = (f"--workdir={teacher}", f"--out={out}", *options, *flags)
    return command.command("generate_pairs", *arguments)


@pytest.fixture(scope="module")
def pairs(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "pairs"
    result = command.run_forked(generate(teacher, folder))
    assert result.returncode == 0, result.stdout
    return folder


def reflow(teacher, pairs, **changes):
    config = flow_toy.get_config()
    given = {"data.pairs": str(pairs), "init_from": str(teacher)}
    config.update_from_flattened_dict({**TINY, **given, **changes})
    return config


def test_pairs_come_back_as_they_were_written(tmp_path):
    assert pairs_lib.write(plan(), tmp_path / "p", make) == 10
    for in_memory in (True, False):
        found = pairs_lib.Pairs(str(tmp_path / "p"), in_memory)
        batch = found.batch(np.asarray([7, 2]), np.asarray([0, 1]))
        np.testing.assert_array_equal(batch["x0"][:, 0], [7, 2])
        np.testing.assert_array_equal(batch["x1"][:, 0], [-7, -2])
        np.testing.assert_array_equal(batch["labels"], [7, 2])
        assert batch["x0"].dtype == np.float32 and len(found) == 10
    train, held = found.split(0.3)
    assert (len(train), len(held)) == (7, 3)
    np.testing.assert_array_equal(held.batch(np.arange(3), np.arange(3))["labels"], [7, 8, 9])


def test_interrupted_writing_goes_on(tmp_path):
    """What is there is not made again, and the end is the same to the byte."""
    pairs_lib.write(plan(), tmp_path / "whole", make)

    def killed(numbers):
        if numbers[0] == 4:
            next(make(numbers))
            raise KeyboardInterrupt
        yield from make(numbers)

    with pytest.raises(KeyboardInterrupt):
        pairs_lib.write(plan(), tmp_path / "p", killed)
    asked = []

    def rest(numbers):
        asked.extend(numbers.tolist())
        return make(numbers)

    assert pairs_lib.write(plan(), tmp_path / "p", rest) == 6
    assert asked == [4, 5, 6, 7, 8, 9]
    chex.assert_trees_all_equal(contents(tmp_path / "p"), contents(tmp_path / "whole"))
    assert pairs_lib.write(plan(), tmp_path / "p", rest) == 0


def test_other_plan_in_the_same_folder_is_refused(tmp_path):
    pairs_lib.write(plan(), tmp_path / "p", make)
    with pytest.raises(DataError, match="other settings"):
        pairs_lib.write(plan(seed=1), tmp_path / "p", make)


def test_shuffled_coupling_is_found(tmp_path, monkeypatch):
    """The checksum is over both ends: X_1 of another pair does not fit."""
    checksum = pairs_lib._checksum
    right = {i: checksum(i, pair) for i, pair in enumerate(make(np.arange(10)))}

    def shuffled(numbers):
        for i in numbers.tolist():
            x0, _, label, nfe = next(make(np.asarray([i])))
            yield x0, np.full(3, -((i + 1) % 10), np.float32), label, nfe

    monkeypatch.setattr(pairs_lib, "_checksum", lambda number, pair: right[number])
    pairs_lib.write(plan(), tmp_path / "p", shuffled)
    monkeypatch.setattr(pairs_lib, "_checksum", checksum)
    with pytest.raises(DataError, match=r"pair 0 .*do not belong together"):
        pairs_lib.Pairs(str(tmp_path / "p"))


def test_pairs_that_are_not_finite_are_not_written(tmp_path):
    bad = lambda numbers: ((x0, x1 * np.nan, n, e) for x0, x1, n, e in make(numbers))
    with pytest.raises(DataError, match="pair 0 is not finite"):
        pairs_lib.write(plan(), tmp_path / "p", bad)


def test_killed_generation_ends_the_same(teacher, tmp_path):
    """The command is killed in its work; the same command then makes what is missing."""
    out = tmp_path / "pairs"
    slow = generate(teacher, out, "--recipe=euler:20000")
    whole = tmp_path / "whole"
    result = command.run_forked(generate(teacher, whole, "--recipe=euler:20000"))
    assert result.returncode == 0, result.stdout
    process = command.start(slow)
    command.wait_for(lambda: shards(out), process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert len(shards(out)) < 5
    result = command.run_forked(slow)
    assert result.returncode == 0, result.stdout
    chex.assert_trees_all_equal(contents(out), contents(whole))
    assert contents(out)[0] == 40


def test_pairs_know_how_they_were_made(teacher, pairs):
    found = pairs_lib.Pairs(str(pairs)).metadata
    assert found["solver"] == "euler:4" and found["number"] == 40 and found["seed"] == 0
    assert str(teacher) in found["run"] and len(found["teacher"]) == 16
    note = json.loads((pairs / "pairs" / "1.0.0" / "pairs.json").read_text())
    assert note["teacher"] == found["teacher"]


def test_reflow_trains_on_pairs(teacher, pairs, tmp_path):
    run = run_lib.train(reflow(teacher, pairs), tmp_path / "run")
    batch = next(run.task.train_data(0, 1))
    known = {x.tobytes() for x in pairs_lib.Pairs(str(pairs)).batch(np.arange(36), None)["x0"]}
    assert batch["x0"].shape == (16, 2) and all(x.tobytes() in known for x in batch["x0"])


def test_pairs_of_another_teacher_are_refused(teacher, pairs, tmp_path):
    config = flow_toy.get_config()
    config.update_from_flattened_dict({**TINY, "seed": 5})
    run_lib.train(config, tmp_path / "other")
    wrong = reflow(tmp_path / "other", pairs)
    with pytest.raises(ConfigError, match=r"of another teacher .*data.teacher"):
        run_lib.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run_lib.train(
        reflow(tmp_path / "other", pairs, **{"data.teacher": str(teacher)}), tmp_path / "ok"
    )


def test_pairs_of_another_shape_are_refused(teacher, tmp_path):
    pairs_lib.write(plan(), tmp_path / "p", make)
    with pytest.raises(DataError, match=r"ends of shape \(3,\)"):
        run_lib.train(reflow(teacher, tmp_path / "p"), tmp_path / "run")


def test_wrong_way_is_an_error(teacher, tmp_path):
    result = command.run_forked(
        generate(teacher, tmp_path / "p", "--from_data", "--recipe=euler:4")
    )
    assert result.returncode == 2 and "the wrong way" in result.stdout, result.stdout


def test_solver_that_does_not_arrive_is_an_error(teacher):
    run = run_lib.load(teacher)
    make = generate_pairs.maker(flow_of(run.config), run.params, plan(solver="rk45:1e-12"))
    with pytest.raises(ConfigError, match="rk45:1e-12 does not reach its tolerance from pair 0"):
        list(make(np.arange(2)))


def test_pairs_from_data_end_at_the_data(teacher):
    """Z_1 are training points and Z_0 where the flow takes them backwards."""
    run = run_lib.load(teacher)
    flow = flow_of(run.config)
    backwards = plan(solver="rf_invert_euler:4", from_data=True)
    (x0, x1, _, nfe), *_ = generate_pairs.maker(flow, run.params, backwards)(np.arange(2))
    ends, labels = flow.data.ends(np.arange(2), training=True)
    np.testing.assert_array_equal(x1, ends[0])
    found = flow.solve(run.params, jnp.asarray(ends), jnp.asarray(labels), "rf_invert_euler:4")
    np.testing.assert_allclose(x0, found.x[0], atol=1e-5)
    assert nfe == 4
