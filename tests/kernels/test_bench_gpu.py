"""The GPU benchmark on CPU: plain JAX stands in for the kernels, at tiny shapes."""

import functools
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from scanax.kernels import bench_gpu, bench_gpu_entries, bench_gpu_times, bench_gpu_worker

DELTA = {"kind": "check", "operation": "delta_product", "shape": (1, 20, 1, 8, 4, 2)}
ADDITIVE = {"kind": "check", "operation": "additive_scan", "shape": (1, 20, 1, 8, 4)}
NEVER = float("inf")


def silent(event, **more):
    pass


silent_start = functools.partial(silent, "start")


def checked(case, implementation):
    [futures] = bench_gpu_worker.compiled([case], implementation, silent, depth=2)
    return bench_gpu_worker.check(case, futures, silent_start)


def test_checks_cover_outputs_states_and_gradients(monkeypatch):
    extras = ("gate", "segments", "state")
    result = checked({**DELTA, "extras": extras}, "reference")
    assert result["passed"] and result["case"] == "delta_product 1,20,1,8,4,2 gate segments state"
    names = {f"gradients.{name}" for name in ("q", "k", "v", "beta", "g", "initial_state")}
    assert set(result["errors"]) == names | {"outputs.0", "outputs.1"}
    assert 0 < max(result["errors"].values()) < 2e-2
    case = {**ADDITIVE, "extras": ("state", "factor")}
    [futures] = bench_gpu_worker.compiled([case], "xla", silent, depth=1)
    result = bench_gpu_worker.check(case, futures, silent_start)
    names = {"outputs.0", "outputs.1.0", "outputs.1.1", "gradients.k_factor"}
    assert result["passed"] and names < set(result["errors"])

    monkeypatch.setattr(bench_gpu_worker, "TOLERANCE", 0.0)
    result = bench_gpu_worker.check(case, futures, silent_start)
    assert not result["passed"] and "above 0.0" in result["reason"]


def test_a_check_that_raises_is_recorded():
    result = checked({**DELTA, "extras": ()}, "no_such")
    assert not result["passed"] and "unknown implementation 'no_such'" in result["reason"]


@pytest.mark.parametrize("case", bench_gpu.CASES, ids=bench_gpu_times.name_of)
def test_cases_are_valid(case):
    inputs = functools.partial(bench_gpu_worker.check_inputs, case)
    arrays, options, cotangents = jax.eval_shape(inputs)
    assert ("initial_state" in arrays) == ("state" in case["extras"])
    assert ("segment_ids" in options) == ("segments" in case["extras"])
    assert cotangents[0].shape == (*case["shape"][:3], case["shape"][4])


def fake(name, operation, shape):
    """Entries of numpy: one is missing, one has no backward, one stops in the second call."""
    if name == "missing":
        raise ImportError("no such\npackage")
    calls = []

    def forward(inputs):
        calls.append(1)
        if name == "breaks" and len(calls) > 1:
            raise RuntimeError("broken")
        return np.ones(3) + (name == "other")

    def both(inputs):
        raise MemoryError("out of memory")

    both = forward if name in ("first", "other") else both
    entry = bench_gpu_entries.Entry(lambda *x: x, forward, both, lambda x: x, lambda o: o)
    return entry._replace(median=lambda call: 2.5) if name == "other" else entry


def timed(names, deadline=NEVER, without=(), make=fake, ahead=True):
    events = []
    tell = lambda event, **more: events.append((event, more))
    item = {"operation": "additive_scan", "shape": [1, 6, 1, 4, 4], "without": [*without]}
    rows = bench_gpu_times.times({**item, "entries": names}, tell, deadline, ahead, make)
    failed = {more["entry"]: more["reason"] for event, more in events if event == "failed"}
    return [(row["implementation"], row["what"]) for row in rows], failed, rows


def test_what_fails_is_left_out_and_the_rest_is_timed():
    names, failed, rows = timed(["first", "missing", "breaks", "half", "other"])
    both = ("forward", "forward+backward")
    expected = [("first", x) for x in both] + [("half", "forward")] + [("other", x) for x in both]
    assert names == expected
    assert failed == {
        "missing": "ImportError: no such package",
        "breaks forward": "RuntimeError: broken",
        "breaks forward+backward": "MemoryError: out of memory",
        "half forward+backward": "MemoryError: out of memory",
    }
    assert all(row["milliseconds"] > 0 and row["repetitions"] == 6 for row in rows)
    assert [row["difference"] for row in rows] == [0.0, None, 0.0, 1.0, None]
    assert [row["do_bench_milliseconds"] for row in rows] == [None, None, None, 2.5, 2.5]


def test_what_hung_before_and_what_is_late_is_not_timed():
    assert timed(["first"], without=["first forward+backward"])[0] == [("first", "forward")]
    assert timed(["first"], without=["first forward"])[0] == []
    assert timed(["first"], deadline=0.0)[0] == []


@pytest.mark.parametrize("ahead", [True, False])
def test_ours_is_compiled_and_timed(ahead):
    names, failed, rows = timed(["xla"], make=bench_gpu_entries.entry, ahead=ahead)
    assert len(names) == 2 and not failed and all(row["compile_seconds"] > 0 for row in rows)
    ceilings = {"bytes_per_second": 1e3, "flops_per_second": 1e6}
    compared = bench_gpu.compare([{**row, "milliseconds": 1e3} for row in rows], ceilings)
    assert [row["over_floor"] for row in compared] == [1e3 / 192, 1e3 / 528]  # bytes, not FLOPs
    lines = bench_gpu.table(compared).splitlines()
    assert len(lines) == 4 and "| xla / this | over floor |" in lines[0] and "| 1.00 |" in lines[2]
    assert bench_gpu.compare(rows, None)[0]["over_floor"] is None


def test_floor():
    for both, tokens in ((False, 128 * (1 + 2 * 2 + 1)), (True, 128 * (3 * (1 + 2 * 2) + 2))):
        traffic = bench_gpu.traffic("delta_product", (2, 3, 5, 128, 128, 2), both)
        assert traffic == 2 * 30 * tokens


@pytest.fixture
def processes(monkeypatch):
    """A list of what processes tell, one after the other, and the requests that they get."""
    told, requests = [], []

    def events(request, deadline):
        requests.append(json.loads(json.dumps(request)))
        yield from told.pop(0)

    monkeypatch.setattr(bench_gpu, "events", events)
    return told, requests


def conducted(items):
    done, failures = [], []
    deadline = time.monotonic() + 60
    on_failure = lambda item, entry, reason: failures.append((item["shape"], entry, reason))
    bench_gpu.conduct(items, {}, deadline, lambda *x: done.append(x[1]), on_failure)
    return done, failures


def test_a_process_that_dies_costs_an_entry(processes):
    told, requests = processes
    start = lambda entry: {"event": "start", "entry": entry}
    done = lambda result: {"event": "done", "result": result}
    end = {"event": "end", "reason": "no answer"}
    told += [[start("compile"), end], [start("a forward+backward"), end], [done(1), done(2), end]]
    items = [
        {"kind": "time", "operation": "o", "shape": n, "entries": ["a"], "without": []}
        for n in (1, 2)
    ]
    assert conducted(items) == ([1, 2], [(1, "a forward+backward", "no answer")])
    assert [request["ahead"] for request in requests] == [True, False, False]
    for item in requests[-1]["items"]:
        assert item["without"] == ["a forward+backward"]

    crash = {"event": "end", "reason": f"{bench_gpu.ENDED} with status -11"}
    told += [[done(1), start("o 2"), crash], [start("o 2"), crash], [done(3), end]]
    checks = [{"kind": "check", "operation": "o", "shape": n} for n in (1, 2, 3)]
    assert conducted(checks) == ([1, 3], [(2, "o 2", crash["reason"])])


def test_the_whole_suite(tmp_path, capfd):
    work = bench_gpu.timed([(1, 20, 1, 8, 8)], ["xla", "no_such"])[:1]
    case = {**DELTA, "extras": ("gate",)}
    status = bench_gpu.run(tmp_path / "out", "reference", [case], work, 500.0, (1 << 10, 64))
    figures = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert status == 0 and figures["correctness"][0]["passed"]
    assert figures["ceilings"]["bytes_per_second"] > 0 and len(figures["rows"]) == 2
    assert {x["entry"] for x in figures["left_out"]} == {
        "no_such forward",
        "no_such forward+backward",
    }
    printed = capfd.readouterr().out
    assert "gate: " in printed and "| delta_product 1,20,1,8,8,1 | forward | xla |" in printed


def test_time_runs_out(tmp_path, capsys):
    work = bench_gpu.timed([(1, 20, 1, 8, 8)], ["xla"])
    case = {**DELTA, "extras": ()}
    assert bench_gpu.run(tmp_path, "xla", [case], work, 0.0, (1, 1)) == 0
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert len(figures["left_out"]) == 5 and not figures["rows"]
    assert capsys.readouterr().out.count(bench_gpu.SKIPPED) == 6


@pytest.mark.parametrize(
    "command",
    [
        ["scanax.kernels.bench", "--suite=gpu"],
        ["scanax.models.language_bench_gpu"],
    ],
)
def test_without_a_gpu(command, tmp_path):
    command = [sys.executable, "-m", *command, f"--out={tmp_path}"]
    wrong = subprocess.run(command, text=True, stderr=subprocess.PIPE, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("error:") == 1
    assert "needs a Hopper GPU: jax" in wrong.stderr and not list(tmp_path.iterdir())
