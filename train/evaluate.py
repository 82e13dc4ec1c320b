"""Evaluates a checkpoint; everything else is read from it.

python -m scanax.train.evaluate --workdir runs/s3 [--step N]
"""

from absl import flags
import jax

from . import evaluation, flags as flags_lib, run as run_lib
from .mesh import make_mesh

flags_lib.define_workdir()
STEP = flags.DEFINE_integer("step", None, "A saved step; the newest by default.")


def main() -> None:
    workdir = flags_lib.workdir()
    run = run_lib.load(workdir, STEP.value)
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


if __name__ == "__main__":
    flags_lib.launch(main)
