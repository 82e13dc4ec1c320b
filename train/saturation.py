"""How much of LightNet's state a new token replaces, over positions.

Dimensions: L layers, R rows, T tokens, H heads, K key channels.

A channel's state is a weighted mean of all values so far, and a token enters it with the weight
1 - exp(g_t), the softmax of its key among the keys so far. Keys that do not grow make it fall like
1 / t: the state saturates, and what is recent no longer counts for more than what is old.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from ..kernels.dtypes import accumulation_dtype
from .long_context import bin_edges


def kept(keys: jax.Array) -> jax.Array:
    """exp(g_t) = exp(z_{t-1} - z_t) of key logits, z their cumulative log-sum-exp.

    Args:
      keys: [R, T, ...].

    Returns:
      [R, T - 1, ...] for t = 2, ..., T, in [0, 1].
    """
    z = jax.lax.cumlogsumexp(keys.astype(accumulation_dtype(keys.dtype)), axis=1)
    return jnp.exp(z[:, :-1] - z[:, 1:])


def saturation(
    module: Any, params: Any, ids: np.ndarray, trained: int, folder: pathlib.Path
) -> str:
    """Measures a causal LightNet language model; writes figures.json and saturation.png.

    Args:
      module: ``LightNetLM``.
      params: of it.
      ids: [R, T] tokens.
      trained: the training length, marked in the picture.
      folder: made if need be.

    Returns:
      A summary: the mean of exp(g_t) over rows, heads and channels, by layer and position.
    """
    c = dataclasses.replace(module.config, remat=False)
    name = "k_conv1d" if c.use_short_conv else "k_proj"
    wanted = lambda m, method: m.name == name and method == "__call__"

    @jax.jit
    def means(params, row_1T):
        _, found = type(module)(c).apply(
            {"params": params}, row_1T, capture_intermediates=wanted, mutable="intermediates"
        )
        layers = [found["intermediates"][f"layers_{i}"] for i in range(c.num_hidden_layers)]
        keys = [layer["attn"][name]["__call__"][0] for layer in layers]
        keys = [k[0] if isinstance(k, tuple) else k for k in keys]  # without the convolution's past
        return jnp.stack([kept(k).mean(axis=(0, 2, 3)) for k in keys])

    kept_LT = np.mean([means(params, row[None]) for row in ids], axis=0)
    folder.mkdir(parents=True, exist_ok=True)
    place_T = np.arange(2, ids.shape[1] + 1)
    shown = [2**i for i in range(1, 31) if 2**i <= ids.shape[1]]
    figures = {
        "rows": len(ids),
        "positions": shown,
        "mean_exp_g": kept_LT[:, np.asarray(shown) - 2].tolist(),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    _draw(place_T, kept_LT, trained, folder / "saturation.png")
    lines = ["mean exp(g_t) over rows, heads and channels"]
    lines.append(
        f"{'t':>8} {'1 - 1/t':>9}" + "".join(f"{f'layer {i}':>9}" for i in range(len(kept_LT)))
    )
    for t in shown:
        cells = "".join(f"{value:>9.4f}" for value in kept_LT[:, t - 2])
        lines.append(f"{t:>8} {1 - 1 / t:>9.4f}{cells}")
    return "\n".join(lines)


def _draw(place_T: np.ndarray, kept_LT: np.ndarray, trained: int, path: pathlib.Path) -> None:
    edges = bin_edges(len(place_T))  # means over stretches, or the curves hide each other
    binned = lambda x_T: np.add.reduceat(x_T, edges[:-1]) / np.diff(edges)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for layer, kept_T in enumerate(kept_LT):
        axes.plot(binned(place_T), binned(1 - kept_T), label=f"layer {layer}")
    axes.plot(place_T, 1 / place_T, color="black", linestyle=":", label="1 / t: keys do not matter")
    axes.axvline(trained, color="grey", linestyle="--", linewidth=1, label="training length")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position t (tokens)")
    axes.set_ylabel("mean weight of the new token, 1 - exp(g)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
