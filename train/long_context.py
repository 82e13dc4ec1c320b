"""Loss and state of a recurrent language model far beyond its training length.

Dimensions: R rows, C tokens of a chunk, B batch, G value heads, K, V key and value width.

Text is read in chunks and the cache is carried from one to the next, so memory does not depend
on the length: a million tokens need what a thousand need.
"""

from collections.abc import Callable
import itertools
import json
import pathlib
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax

from . import plots
from .task import Curve

BINS_PER_OCTAVE = 4


def effective_rank(state: jax.Array) -> jax.Array:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007).

    Args:
      state: [..., K, V].

    Returns:
      [...] between 1 and min(K, V); 1 for a zero matrix.
    """
    sigma = jnp.linalg.svd(state, compute_uv=False)
    p = sigma / jnp.maximum(sigma.sum(axis=-1, keepdims=True), 1e-30)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1))


def measure(
    apply: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    cache: Any,
    states: Callable[[Any], jax.Array],
    rows: np.ndarray,
    chunk: int,
) -> dict[str, np.ndarray]:
    """Streams rows through a model.

    Args:
      apply: (params, ids [R, C], cache) -> (logits [R, C, S], cache).
      params: of the model.
      cache: before the first token.
      states: cache -> matrices [layers, R, G, K, V].
      rows: [R, L + 1] tokens, L a multiple of ``chunk``. May lie on disk.
      chunk: tokens computed at once.

    Returns:
      edges [n + 1]: position bins, about ``BINS_PER_OCTAVE`` to each doubling;
      loss [n]: mean cross-entropy of the tokens in each bin, nats;
      position [L / chunk]: the ends of the chunks;
      rank [L / chunk, layers, G]: effective rank of the state there, mean over rows;
      peak_mb [L / chunk]: largest memory of the process so far.
    """
    length = rows.shape[1] - 1
    edges = bin_edges(length)
    sums, ranks, peaks = np.zeros(len(edges) - 1), [], []

    def step(params, ids, labels, cache):
        logits, cache = apply(params, ids, cache)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss.mean(axis=0), effective_rank(states(cache)).mean(axis=1), cache

    compiled = jax.jit(step, donate_argnums=3)
    for start in range(0, length, chunk):
        window = np.asarray(rows[:, start : start + chunk + 1], np.int32)
        loss_C, rank, cache = compiled(params, window[:, :-1], window[:, 1:], cache)
        bins = np.searchsorted(edges, np.arange(start, start + chunk), side="right") - 1
        np.add.at(sums, bins, np.asarray(loss_C, np.float64))
        ranks.append(np.asarray(rank))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _PER_MB)
    return {
        "edges": edges,
        "loss": sums / np.diff(edges),
        "position": np.arange(chunk, length + 1, chunk),
        "rank": np.stack(ranks),
        "peak_mb": np.asarray(peaks),
    }


def bin_edges(length: int) -> np.ndarray:
    """Whole numbers from 0 to ``length``, growing by a factor of 2^(1/BINS_PER_OCTAVE)."""
    steps = np.arange(0, np.log2(length), 1 / BINS_PER_OCTAVE)
    return np.unique(np.concatenate([[0], np.round(2**steps).astype(int), [length]]))


def write_report(
    found: dict[str, np.ndarray],
    nats_per_unit: float,
    unit: str,
    trained: int,
    folder: pathlib.Path,
) -> str:
    """Writes curve.json, curve.png, rank.png, figures.json; returns a summary.

    Args:
      found: what :func:`measure` returns.
      nats_per_unit: what the loss is divided by.
      unit: of the result, "bits per byte".
      trained: the training length, in tokens.
      folder: made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    edges, loss = found["edges"], found["loss"] / nats_per_unit
    curve = Curve(
        metric="loss_by_position",
        x=[float(x) for x in (edges[:-1] + edges[1:]) / 2],
        x_label="position (tokens)",
        y_label=unit,
        marks={"training length": trained},
    )
    plots.write_curve(curve, loss, folder.parents[2].name, folder)
    _draw_rank(found, trained, folder / "rank.png")
    lines = [f"{'positions':>20}  {unit}"]
    figures = {}
    for low, high in _ranges(trained, int(edges[-1])):
        inside = (edges[:-1] >= low) & (edges[1:] <= high)
        if inside.any():
            weight = np.diff(edges)[inside]
            figures[f"{low}-{high}"] = float(np.average(loss[inside], weights=weight))
            lines.append(f"{low:>9} to {high:>7}  {figures[f'{low}-{high}']:.4f}")
    tenth = found["peak_mb"][max(0, len(found["peak_mb"]) // 10 - 1)]
    last = found["peak_mb"][-1]
    lines.append(f"peak memory {tenth:.0f} MB after a tenth of the text, {last:.0f} MB at its end")
    rank = found["rank"]
    lines.append(f"effective rank of the state at the end, mean over heads: {rank[-1].mean():.2f}")
    figures |= {"peak_mb_tenth": tenth, "peak_mb": last, "rank": rank[-1].tolist()}
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return "\n".join(lines)


def _ranges(trained: int, length: int) -> list[tuple[int, int]]:
    """0 .. trained, then one doubling after the other."""
    edges = [0, trained]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return list(itertools.pairwise(edges))


def _draw_rank(found: dict[str, np.ndarray], trained: int, path: pathlib.Path) -> None:
    """The effective rank over positions: a panel per layer, a line per head."""
    layers, heads = found["rank"].shape[1:]
    figure = Figure(figsize=(4 * layers, 3.5), layout="constrained")
    panels = figure.subplots(1, layers, sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(panels):
        for head in range(heads):
            axes.plot(found["position"], found["rank"][:, layer, head], label=f"head {head}")
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_title(f"layer {layer}")
        axes.set_xlabel("position (tokens)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("effective rank of the state")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


_PER_MB = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes or kilobytes
