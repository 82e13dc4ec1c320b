"""Samples from a checkpoint; everything else is read from it.

python -m scanax.train.sample --workdir runs/s3 [--num N] [--seed S] [--step N]
"""

from absl import flags

from . import evaluation, flags as flags_lib, run as run_lib
from .config import ConfigError

flags_lib.define_workdir()
STEP = flags.DEFINE_integer("step", None, "A saved step; the newest by default.")
NUM = flags.DEFINE_integer("num", 16, "Number of samples.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0)


def main() -> None:
    run = run_lib.load(flags_lib.workdir(), STEP.value)
    if run.task.sample is None:
        raise ConfigError(f"task {run.config.task} has nothing to sample")
    print(evaluation.draw_samples(run.task, run.params, run.extra, SEED.value, NUM.value))


if __name__ == "__main__":
    flags_lib.launch(main)
