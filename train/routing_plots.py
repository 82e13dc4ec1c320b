"""Pictures of what ``routing.py`` measures.

Dimensions: L layers, E experts.
"""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
import numpy as np


def draw(found: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes frequency.png, entropy.png, similarity.png and, of several layers, information.png.

    Args:
      found: of ``routing.figures``.
      folder: where to.
    """
    pictures = {"frequency": _frequency, "entropy": _entropy, "similarity": _similarity}
    if len(found["frequency"]) > 1:
        pictures["information"] = _information
    for name, picture in pictures.items():
        picture(found).savefig(folder / f"{name}.png", dpi=120)


def _frequency(found: Mapping[str, Any]) -> Figure:
    """How often each expert was chosen, in multiples of an equal share."""
    frequency_LE = np.asarray(found["frequency"])
    layers, experts = frequency_LE.shape
    size = (2.5 + min(0.3 * experts, 9), 1.8 + 0.3 * layers)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = _heat(axes, frequency_LE * experts, "magma", 0, max(2, experts * frequency_LE.max()))
    axes.set_aspect("auto")
    axes.set(xlabel="expert", ylabel="layer", title="how often experts are chosen")
    figure.colorbar(image, label="times an equal share")
    return figure


def _entropy(found: Mapping[str, Any]) -> Figure:
    """Histograms of the tokens' entropies, a panel per layer."""
    edges, counts_LN = (np.asarray(found["entropy_histogram"][n]) for n in ("edges", "tokens"))
    columns = min(4, len(counts_LN))
    rows = math.ceil(len(counts_LN) / columns)
    size = (1 + 2.3 * columns, 1.2 + 1.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for layer, (axes, counts_N) in enumerate(zip(grid, counts_LN, strict=False)):
        axes.stairs(counts_N / counts_N.sum(), edges, fill=True)
        mean = found["layers"]["entropy"][layer]
        axes.axvline(mean, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"layer {layer}, mean {mean:.2f}", fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in grid[len(counts_LN) :]:
        axes.set_axis_off()
    figure.supxlabel(f"entropy (nats, at most {edges[-1]:.2f})")
    figure.supylabel("share of the tokens")
    return figure


def _information(found: Mapping[str, Any]) -> Figure:
    """Mutual information between layers, the paper's and that of first choices."""
    titles = {"mi_paper": "mi_paper", "mi_top1": "mi_top1 (first choices)"}
    layers = len(found["pairs"]["mi_top1"])
    side = 1.2 + min(max(2, 0.25 * layers), 5)
    figure = Figure(figsize=(2.3 * side, side), layout="constrained")
    figure.suptitle("mutual information between layers")
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        between_LL = _without_diagonal(found["pairs"][name])
        image = _heat(axes, between_LL, "viridis", 0, _highest(between_LL))
        axes.set(xlabel="layer", ylabel="layer", title=title)
        figure.colorbar(image, label="nats", shrink=0.8)
    return figure


def _similarity(found: Mapping[str, Any]) -> Figure:
    """Experts against experts of the first, the middle and the last layer."""
    similarity_LEE = np.asarray(found["expert_similarity"])
    last = len(similarity_LEE) - 1
    shown = {layer: _without_diagonal(similarity_LEE[layer]) for layer in (0, last // 2, last)}
    limit = max(_highest(np.abs(x)) for x in shown.values())
    side = 1.8 + min(0.12 * similarity_LEE.shape[1], 2.5)
    figure = Figure(figsize=(1.5 + side * len(shown), 0.6 + side), layout="constrained")
    figure.suptitle("similarity of experts")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (layer, alike_EE) in zip(panels, shown.items(), strict=True):
        image = _heat(axes, alike_EE, "RdBu_r", -limit, limit)
        axes.set(xlabel="expert", title=f"layer {layer}")
    panels[0].set_ylabel("expert")
    figure.colorbar(image, ax=panels, label="similarity", shrink=0.8)
    return figure


def _heat(axes: Axes, matrix: np.ndarray, colours: str, low: float, high: float) -> AxesImage:
    """A matrix, its rows from above; grey where it is NaN."""
    image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=high)
    axes.set_facecolor("lightgrey")
    for axis, size in zip((axes.yaxis, axes.xaxis), matrix.shape, strict=True):
        axis.set_ticks(range(0, size, math.ceil(size / 16)))
    return image


def _without_diagonal(matrix: Any) -> np.ndarray:
    """NaN there: it says how a thing goes with itself, and would outshine the others."""
    matrix = np.asarray(matrix, float)
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _highest(matrix: np.ndarray) -> float:
    """Of the entries that are no NaN; 1 if there is none above 0."""
    return float(np.nanmax(matrix, initial=0)) or 1.0
