"""Evaluates a checkpoint; everything else is read from it.

  python -m scanax.train.evaluate --workdir runs/s3 [--step N]
  python -m scanax.train.evaluate --workdir runs/lm --analysis long_context [--length 1000000]

An analysis writes its figures and pictures into eval/<step>/<analysis>/.
"""

import pathlib

from absl import flags
import jax

from . import evaluation, flags as flags_lib, run as run_lib
from .config import ConfigError
from .mesh import make_mesh

flags_lib.define_workdir()
flags_lib.define_sampler()
STEP = flags.DEFINE_integer("step", None, "A saved step; the newest by default.")
ANALYSIS = flags.DEFINE_string("analysis", "", "Instead of the metrics, one of the task's.")
ROWS = flags.DEFINE_integer("rows", 0, "Of an analysis; 0 = its default.", lower_bound=0)
LENGTH = flags.DEFINE_integer("length", 0, "Tokens per row; 0 = its default.", lower_bound=0)


def main() -> None:
    workdir = flags_lib.workdir()
    run = run_lib.load(workdir, STEP.value, sampler=flags_lib.sampler())
    if ANALYSIS.value:
        analyse(run, workdir / "eval" / f"{run.step:08d}" / ANALYSIS.value)
        return
    evaluate = evaluation.make_evaluator(run.task, run.config, make_mesh(run.config.mesh))
    means = evaluate(run.params, run.extra)
    folder = workdir / "eval" / f"{run.step:08d}"
    text = evaluation.write_report(run.task, run.config, folder, means, run.params, run.extra)
    print(f"step {run.step} on {jax.default_backend()}")
    for name, value in means.items():
        if value.ndim == 0:
            print(f"{name} {float(value):.6g}")
    print(text)
    print(f"written to {folder}")


def analyse(run: run_lib.Run, folder: pathlib.Path) -> None:
    analyses = run.task.analyses
    if ANALYSIS.value not in analyses:
        raise ConfigError(
            f"task {run.config.task} has no analysis {ANALYSIS.value!r};"
            f" it has {', '.join(analyses) or 'none'}"
        )
    print(analyses[ANALYSIS.value](run.params, run.extra, folder, ROWS.value, LENGTH.value))
    print(f"written to {folder}")


if __name__ == "__main__":
    flags_lib.launch(main)
