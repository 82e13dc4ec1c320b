"""Draws the accuracy-over-length curves of several runs in one picture.

python -m scanax.train.compare --workdirs runs/a,runs/b --labels "a,b" --out picture.png
"""

import pathlib

from absl import flags
import numpy as np

from . import flags as flags_lib, plots
from .config import ConfigError

WORKDIRS = flags.DEFINE_list("workdirs", [], "Folders of evaluated runs.")
LABELS = flags.DEFINE_list("labels", [], "A label per folder; the folders' names by default.")
OUT = flags.DEFINE_string("out", "accuracy.png", "The picture to write.")
TRAINED = flags.DEFINE_integer("trained", 128, "Training length, drawn as a dashed line.")


def main() -> None:
    workdirs = [pathlib.Path(name) for name in WORKDIRS.value]
    labels = LABELS.value or [workdir.name for workdir in workdirs]
    if not workdirs or len(labels) != len(workdirs):
        raise ConfigError("--workdirs needs at least one folder, and --labels as many entries")
    curves = {label: _curve(w) for label, w in zip(labels, workdirs, strict=True)}
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
