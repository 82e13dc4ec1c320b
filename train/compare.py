"""Draws the evaluation curves of several runs in one picture.

python -m scanax.train.compare --run "two steps=runs/a" --run "one step=runs/b" --out all.png

Runs with the same label become one line, their mean, in a band from lowest to highest.
"""

import pathlib

from absl import flags

from . import flags as flags_lib, plots
from .config import ConfigError

RUNS = flags.DEFINE_multi_string("run", [], "LABEL=FOLDER of an evaluated run; repeat it.")
ANALYSIS = flags.DEFINE_string("analysis", "", "Curves of this analysis, for example long_context.")
OUT = flags.DEFINE_string("out", "curves.png", "The picture to write.")


def main() -> None:
    curves = {}
    for entry in RUNS.value:
        label, equals, folder = entry.partition("=")
        if not equals:
            raise ConfigError(f"--run {entry!r} should look like LABEL=FOLDER")
        curve = plots.read_curve(pathlib.Path(folder), ANALYSIS.value)
        if curve is None:
            raise ConfigError(f"{folder} has no curve; run scanax.train.evaluate on it first")
        curves.setdefault(label, []).append(curve)
    if not curves:
        raise ConfigError("--run LABEL=FOLDER is required")
    shapes = {(curve["metric"], tuple(curve["x"])) for found in curves.values() for curve in found}
    if len(shapes) > 1:
        raise ConfigError("these runs were evaluated on different lengths; they do not compare")
    plots.draw(curves, pathlib.Path(OUT.value))
    print(f"written to {OUT.value}")


if __name__ == "__main__":
    flags_lib.launch(main)
