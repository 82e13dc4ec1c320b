"""Pictures, drawn on the host without a display."""

from collections.abc import Mapping
import pathlib

from matplotlib.figure import Figure
import numpy as np


def accuracy_over_length(
    curves: Mapping[str, np.ndarray], path: pathlib.Path, trained: int | None = None
) -> None:
    """Sequence accuracy over word length, one line per entry, as PNG.

    Args:
      curves: label -> accuracies for lengths 1, 2, ...
      path: the file to write.
      trained: longest training length, drawn as a dashed line.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot(np.arange(1, len(curve) + 1), 100 * curve, label=label, linewidth=2)
    if trained is not None:
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1, label="training length")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("word length")
    axes.set_ylabel("words with every product right (%)")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)
