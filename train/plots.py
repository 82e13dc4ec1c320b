"""Curves of evaluations, and pictures of them, drawn on the host without a display."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from .task import Curve

CURVE = "curve.json"  # beside the picture in a run's eval/<step>/


def write_curve(curve: Curve, y: np.ndarray, label: str, folder: pathlib.Path) -> None:
    """Writes curve.json, which explains itself, and curve.png."""
    values = [None if np.isnan(value) else float(value) for value in y]
    text = json.dumps({**dataclasses.asdict(curve), "x": list(curve.x), "y": values})
    (folder / CURVE).write_text(text + "\n")
    draw({label: [_read(text)]}, folder / "curve.png")


def read_curve(workdir: pathlib.Path, analysis: str = "") -> dict[str, Any] | None:
    """The curve of a run's newest evaluation, or analysis: fields of ``Curve``, y [len(x)]."""
    found = sorted(workdir.glob(f"eval/*/{analysis or '.'}/{CURVE}"))
    return _read(found[-1].read_text()) if found else None


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """One line per label: the mean of its curves, between their lowest and highest values.

    Args:
      curves: label -> curves as ``read_curve`` returns them, of one metric, each label's over
        the same x.
      path: the PNG to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = next(iter(curves.values()))[0]
    for label, several in curves.items():
        x, y = several[0]["x"], np.stack([curve["y"] for curve in several])
        axes.plot(x, y.mean(axis=0), label=label, linewidth=2)
        if len(several) > 1:
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), alpha=0.15)
    for name, x in first["marks"].items():
        axes.axvline(x, color="grey", linestyle="--", linewidth=1, label=name)
    if first["log_x"]:
        axes.set_xscale("log", base=2)
    if first["y_range"]:
        axes.set_ylim(*first["y_range"])
    axes.set_xlabel(first["x_label"])
    axes.set_ylabel(first["y_label"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _read(text: str) -> dict[str, Any]:
    curve = json.loads(text)
    return {**curve, "y": np.asarray(curve["y"], float)}
