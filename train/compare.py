"""Draws the accuracy-over-length curves of several runs in one picture.

python -m scanax.train.compare --run "two steps=runs/a" --run "one step=runs/b" --out all.png
"""

import pathlib

from absl import flags
import numpy as np

from . import flags as flags_lib, plots
from .config import ConfigError

RUNS = flags.DEFINE_multi_string("run", [], "LABEL=FOLDER of an evaluated run; repeat it.")
OUT = flags.DEFINE_string("out", "accuracy.png", "The picture to write.")
TRAINED = flags.DEFINE_integer("trained", 128, "Training length, drawn as a dashed line.")


def main() -> None:
    curves = {}
    for entry in RUNS.value:
        label, equals, folder = entry.rpartition("=")
        if not equals:
            raise ConfigError(f"--run {entry!r} should look like LABEL=FOLDER")
        curves[label] = _curve(pathlib.Path(folder))
    if not curves:
        raise ConfigError("--run LABEL=FOLDER is required")
    plots.accuracy_over_length(curves, pathlib.Path(OUT.value), trained=TRAINED.value)
    print(f"written to {OUT.value}")


def _curve(workdir: pathlib.Path) -> np.ndarray:
    """Accuracy by length from a run's newest evaluation."""
    found = sorted(workdir.glob("eval/*/curves.npz"))
    if not found:
        raise ConfigError(f"{workdir} has no evaluation; run scanax.train.evaluate on it first")
    with np.load(found[-1]) as curves:
        return curves["accuracy_by_length"]


if __name__ == "__main__":
    flags_lib.launch(main)
