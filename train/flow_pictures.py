"""Pictures of flows: grids of images, points, trajectories, curves of quality.

Dimensions: N samples, S states of a trajectory, H height, W width, C channels.
"""

from collections.abc import Mapping, Sequence
import io
import pathlib

from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from .data.mixtures import MixtureConfig, Mixtures
from .grid import image_grid

COLOURS = ("tab:purple", "tab:red")  # of X_0 and X_1


def images(samples_NHWC: np.ndarray, columns: int | None = None) -> np.ndarray:
    """A grid of images in [-1, 1]: uint8 [H', W'] or [H', W', 3]."""
    grid = image_grid(np.clip(samples_NHWC, -1, 1), columns)
    return grid[..., 0] if grid.shape[-1] == 1 else grid


def points(config: MixtureConfig, samples_N2: np.ndarray) -> np.ndarray:
    """Samples over both mixtures: uint8 [H, W, 3]."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    _mixtures(axes, config)
    axes.scatter(*samples_N2.T, s=6, color="tab:green", label="samples")
    axes.legend(fontsize="small", loc="upper right")
    return _pixels(figure)


def trajectories(
    config: MixtureConfig, paths_SN2: Mapping[str, np.ndarray], file: pathlib.Path
) -> None:
    """Paths of points, one panel per name, over both mixtures, as a PNG."""
    figure = Figure(figsize=(5 * len(paths_SN2), 5), layout="constrained")
    panels = figure.subplots(1, len(paths_SN2), squeeze=False)[0]
    for axes, (name, path_SN2) in zip(panels, paths_SN2.items(), strict=True):
        _mixtures(axes, config)
        axes.plot(path_SN2[..., 0], path_SN2[..., 1], color="tab:green", alpha=0.4, linewidth=0.8)
        axes.scatter(*path_SN2[-1].T, s=6, color="black", zorder=3)
        axes.set_title(name)
    figure.savefig(file, dpi=120)


def lines(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    file: pathlib.Path,
) -> None:
    """Curves over a logarithmic x axis, as a PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, y in curves.items():
        axes.plot(x, y, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def _mixtures(axes, config: MixtureConfig) -> None:
    numbers = np.arange(500)
    batch = Mixtures(config, seed=-1).batch(numbers, numbers)
    for name, end, colour in zip(("X_0", "X_1"), ("x0", "x1"), COLOURS, strict=True):
        axes.scatter(*batch[end].T, s=4, alpha=0.2, color=colour, label=name)
    axes.set_aspect("equal")


def _pixels(figure: Figure) -> np.ndarray:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=120)
    return np.asarray(Image.open(memory).convert("RGB"))
