"""Runs a grid of configs and seeds, each as its own training run, and tabulates the results.

  python -m scanax.train.sweep --config configs/word_problem_s3.py --workdir runs/sweep \\
      --grid model.num_householder=1,2 --grid model.allow_neg_eigval=true,false --seeds 3 \\
      --solved "sequence_accuracy_512>=0.95"

A run's folder is WORKDIR/CELL/seed_S, as ``scanax.train.main`` writes it; its output is in
WORKDIR/CELL/seed_S.log. Interrupt the sweep whenever you like: the same command goes on where it
was, inside runs too. ``results.json``, ``table.md`` and ``curves.png`` are rewritten after each
run. ``--jobs N`` keeps N runs going, each on its share of the cores and, where
CUDA_VISIBLE_DEVICES names them, of the GPUs. Keys that change together stand in one axis:
``--grid model.num_householder:model.num_heads=1:6,2:4``.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

from absl import flags
import ml_collections
import numpy as np

from . import evaluation, flags as flags_lib, loop, plots, tasks
from .config import Config, ConfigError, flatten, from_dict, unknown_key
from .evaluation import Condition
from .preemption import Preemption

MAIN = (sys.executable, "-m", "scanax.train.main")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of the sweep.

    Attributes:
      cell: config key -> value, what the grid sets.
      seed: of parameters and data.
      config: the whole config.
      folder: its workdir.
      command: what runs it.
    """

    cell: Mapping[str, Any]
    seed: int
    config: Config
    folder: pathlib.Path
    command: Sequence[str]

    @property
    def label(self) -> str:
        return label(self.cell)

    def done(self) -> bool:
        """Whether it has run to its end: the last step, or what it was to stop at."""
        means = self.means()
        if means is None or not list(self.folder.glob(f"checkpoints/*{means['step']}")):
            return False
        stop = self.config.evaluation.stop_when
        early = bool(stop) and Condition.parse(stop).met(means)
        return early or means["step"] == self.config.num_steps

    def means(self) -> dict[str, Any] | None:
        """The scalars of its newest evaluation, and its step."""
        found = sorted(self.folder.glob("eval/*/metrics.json"))
        if not found:
            return None
        means = json.loads(found[-1].read_text())
        return {**means, "step": int(found[-1].parent.name)}


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags_lib.define_config()
    flags_lib.define_workdir()
    flags.DEFINE_multi_string("grid", [], "KEY=VALUE,VALUE,... or KEY:KEY=A:B,...; repeat it.")
    flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, ... per cell.", lower_bound=1)
    flags.DEFINE_integer("jobs", 1, "Runs at the same time.", lower_bound=1)
    flags.DEFINE_string("solved", "", "METRIC>=NUMBER or METRIC<=NUMBER: when a run counts.")
    flags.DEFINE_list("metrics", [], "Columns of the table; all scalar metrics by default.")


def main() -> None:
    given = flags.FLAGS
    file, base = flags_lib.config_file()
    workdir = flags_lib.workdir()
    solved = Condition.parse(given.solved) if given.solved else None
    axes = [parse_axis(text) for text in given.grid]
    runs = expand(file, base, axes, given.seeds, workdir)
    for run in runs:
        loop.check_workdir(run.folder, run.config, allow_change=False)
    wanted = [*given.metrics, *([solved.metric] if solved else [])]
    first = runs[0].config
    evaluation.check_metrics("--metrics and --solved", wanted, tasks.build(first), first)
    left = [run for run in runs if not run.done()]
    print(f"{len(runs)} runs in {workdir}, {len(runs) - len(left)} of them done", flush=True)
    workdir.mkdir(parents=True, exist_ok=True)
    with Preemption() as preemption:
        after = lambda failed: report(workdir, runs, failed, solved, given.metrics)
        failed = execute(left, given.jobs, preemption, after)
        if preemption.received is not None:
            preemption.leave("interrupted; the same command continues")
    print(report(workdir, runs, failed, solved, given.metrics))
    if failed:
        logs = ", ".join(f"{run.folder}.log" for run in failed)
        raise SweepFailed(f"{len(failed)} of {len(runs)} runs failed; see {logs}")


class SweepFailed(RuntimeError):
    """Some runs ended in an error; the message names their logs."""

    exit_code = 1


def parse_axis(text: str) -> list[dict[str, str]]:
    """ "KEY=1,2" -> [{KEY: 1}, {KEY: 2}]; "KEY:OTHER=1:6,2:4" sets both in each.

    Commas inside brackets do not separate: data.eval_lengths=(8,16),(8,32) are two values.
    """
    head, equals, tail = text.partition("=")
    parts, depth = [""], 0
    for character in tail:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    keys = head.strip().split(":")
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--grid {text!r} names a key twice")
    points = [part.split(":") if len(keys) > 1 else [part] for part in parts]
    points = [[value.strip() for value in values] for values in points]
    if not equals or any(len(values) != len(keys) or not all(values) for values in points):
        raise ConfigError(
            f"--grid {text!r} should look like KEY=VALUE,VALUE or KEY:KEY=VALUE:VALUE,VALUE:VALUE"
        )
    return [dict(zip(keys, values, strict=True)) for values in points]


def expand(
    file: str,
    base: ml_collections.ConfigDict,
    axes: Sequence[Sequence[Mapping[str, str]]],
    seeds: int,
    workdir: pathlib.Path,
) -> list[Run]:
    """All runs of a grid, every config validated; seeds change fastest.

    Args:
      file: the config file, which the runs' commands name.
      base: what it returns, with overrides.
      axes: of each, the values of its keys, as text; see :func:`parse_axis`.
      seeds: runs per cell.
      workdir: of the sweep.

    Raises:
      ConfigError: for an unknown key, a value of the wrong type, or an impossible config.
    """
    known = flatten(base.to_dict())
    keys = [key for axis in axes for key in axis[0]]
    for key in keys:
        if key not in known:
            raise ConfigError(unknown_key(key, list(known)))
    runs = []
    for points in itertools.product(*axes):
        texts = {key: text for point in points for key, text in point.items()}
        cell = {key: parse_value(key, text, known[key]) for key, text in texts.items()}
        for seed in range(seeds):
            config = ml_collections.ConfigDict(base.to_dict())
            seeds_too = {key: seed for key in ("seed", "data.seed") if key in known}
            config.update_from_flattened_dict({**seeds_too, **cell})
            frozen = from_dict(config.to_dict())
            if seed == 0:
                tasks.build(frozen)
            folder = workdir / label(cell) / f"seed_{seed}"
            overrides = flags_lib.overrides(file, config.to_dict())
            command = [*MAIN, f"--config={file}", f"--workdir={folder}", *overrides]
            runs.append(Run(cell, seed, frozen, folder, command))
    if len({run.folder for run in runs}) < len(runs) or len(set(keys)) < len(keys):
        raise ConfigError("--grid names a key or a value twice")
    return runs


def parse_value(key: str, text: str, default: Any) -> Any:
    """The text as a value of the default's type; a ConfigError if it is none."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(json.loads(f"[{text.strip('()[]').rstrip(',')}]"))
        return type(default)(text)
    except (KeyError, ValueError) as error:
        kind = type(default).__name__
        raise ConfigError(f"--grid {key}: {text!r} is not of type {kind}") from error


def label(cell: Mapping[str, Any]) -> str:
    """A cell's name, of its folder too: "num_householder=2,allow_neg_eigval=True"."""
    texts = [f"{key.rpartition('.')[2]}={value}" for key, value in cell.items()]
    return ",".join(texts).replace("/", "_").replace(" ", "") or "all"


def execute(
    runs: Sequence[Run], jobs: int, preemption: Preemption, after: Callable[[list[Run]], Any]
) -> list[Run]:
    """Runs them, ``jobs`` at a time; returns those that failed.

    A signal is passed on: the runs save and end, and no other begins. ``after`` is called
    with the failed ones whenever a run has ended.
    """
    waiting, failed = list(runs), []
    running: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
    told = False
    while waiting or running:
        for slot in range(jobs):
            if slot not in running and waiting and preemption.received is None:
                run = waiting.pop(0)
                print(f"{run.label} seed {run.seed}: started", flush=True)
                running[slot] = run, start(run, slot, jobs)
        if preemption.received is not None:
            waiting = []
            if not told:
                told = True
                for _, process in running.values():
                    process.send_signal(signal.SIGTERM)
        for slot, (run, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            if process.returncode == 0:
                print(f"{run.label} seed {run.seed}: done", flush=True)
            elif preemption.received is None:
                failed.append(run)
                print(f"{run.label} seed {run.seed}: failed, see {run.folder}.log", flush=True)
            after(failed)
        time.sleep(0.2)
    return failed


def start(run: Run, slot: int, jobs: int) -> subprocess.Popen:
    """Starts a run as a process of its own, on its slot's share of cores and GPUs."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share(gpus, slot, jobs))
    with open(f"{run.folder}.log", "a") as log:
        print(shlex.join(run.command), file=log, flush=True)
        process = subprocess.Popen(
            run.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process.pid, share(cores, slot, jobs))
    return process


def share(items: Sequence[Any], slot: int, jobs: int) -> Sequence[Any]:
    """Every ``jobs``-th item from ``slot`` on; at least one."""
    return items[slot::jobs] or [items[slot % len(items)]]


def report(
    workdir: pathlib.Path,
    runs: Sequence[Run],
    failed: Sequence[Run],
    solved: Condition | None,
    metrics: Sequence[str],
) -> str:
    """Writes results.json, table.md and curves.png of the runs that ended; returns the table."""
    results, curves = [], {}
    for run in runs:
        if run in failed:
            results.append({"cell": dict(run.cell), "seed": run.seed, "failed": True})
        elif run.done():
            results.append({"cell": dict(run.cell), "seed": run.seed, **(run.means() or {})})
            curve = plots.read_curve(run.folder)
            if curve is not None:
                curves.setdefault(run.label, []).append(curve)
    text = table(results, metrics, solved)
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (workdir / "table.md").write_text(text + "\n")
    if curves:
        plots.draw(curves, workdir / "curves.png")
    return text


def table(
    results: Sequence[Mapping[str, Any]], metrics: Sequence[str], solved: Condition | None
) -> str:
    """A Markdown table, a row per cell: solved seeds, and each metric's mean (lowest to highest).

    Args:
      results: per run the cell, the seed, and the last step and the metrics, or "failed": a
        run that ended in an error has no metrics and counts as not solved.
      metrics: the columns; all metrics if empty.
      solved: when a run counts as solved; None for no such column.
    """
    done = [row for row in results if "failed" not in row]
    if not done:
        return "no run is done"
    keys = list(done[0]["cell"])
    wanted = list(metrics) or [name for name in done[0] if name not in ("cell", "seed")]
    head = [key.rpartition(".")[2] for key in keys] + ["solved" if solved else "seeds", *wanted]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = {json.dumps(row["cell"]): row["cell"] for row in results}
    for text, cell in cells.items():
        rows = [row for row in done if json.dumps(row["cell"]) == text]
        ended = sum(json.dumps(row["cell"]) == text for row in results)
        count = f"{ended}" if solved is None else f"{sum(map(solved.met, rows))} of {ended}"
        if ended > len(rows):
            count += f" ({ended - len(rows)} failed)"
        found = [_spread([row[name] for row in rows]) if rows else "-" for name in wanted]
        lines.append("| " + " | ".join([*map(str, cell.values()), count, *found]) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean, low, high = (f"{f(values):.4g}" for f in (np.mean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    define_flags()
    flags_lib.launch(main)
