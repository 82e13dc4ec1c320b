"""The Task: everything the training loop knows about a family, as a record of functions.

Dimensions: B examples in the (micro)batch.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np


class Aux(NamedTuple):
    """What ``Task.loss`` returns beside the loss.

    Attributes:
      weight: what the loss sum is divided by, once, after microbatches and devices.
      extra: the new non-optimised state.
      metrics: name -> (sum, weight), divided likewise.
    """

    weight: jax.Array
    extra: Any
    metrics: Mapping[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Curve:
    """The metric of ``Task.evaluate`` that is drawn: an array, one value per x.

    Attributes:
      metric: its name.
      x: of each value.
      x_label, y_label: what they are.
      marks: name -> x, drawn as dashed lines.
      log_x: logarithmic x axis, base 2.
      y_range: of the y axis; None to fit the curves.
    """

    metric: str
    x: Sequence[float]
    x_label: str
    y_label: str
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_x: bool = True
    y_range: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One family on one kind of data.

    Sums and weights, never means: the loop divides once. ``keys`` holds one PRNG key per
    example, so that losses do not depend on microbatches or on the number of devices.

    Attributes:
      batch_spec: name -> shape and dtype of a global training batch.
      eval_spec: the same for an evaluation batch.
      param_axes: pytree like the parameters; leaves are tuples of logical axis names.
      init: (key) -> (params, extra); extra, a mapping, is checkpointed but not optimised. What
        lies under its key "rows" are arrays [B, ...] that row b of a batch hands to row b of the
        next, divided over devices and microbatches as the batch is.
      loss: (params, extra, batch, keys [B]) -> (loss sum, Aux).
      evaluate: (params, extra, batch, keys [B]) -> {name: (sum, weight)}; a sum may be an
        array (a curve).
      frozen: regular expressions; parameters in whose path one is found are never updated.
      settle: (extra) -> extra, once an update, when all its microbatches are through.
      begin: () -> None, host side, when a run begins and not when it continues; raises a
        ConfigError if what it is to begin with does not fit.
      given: () -> arrays that ``loss`` finds under "given" in ``extra`` and that are neither
        changed nor saved: read anew, host side, whenever a run starts or continues.
      derive: (totals, means) -> further means of an evaluation: totals are the sums and weights
        of all batches, float64, means their quotients.
      train_data: (process_index, process_count) -> a checkpointable iterator of this
        process's part of each batch, as numpy arrays.
      eval_data: (index of the batch) -> one global evaluation batch, always the same; None
        after the last one.
      sample: (params, extra, key, n) -> samples, or None if the family has none.
      render: (samples) -> text for people, or a picture, uint8 [H, W] or [H, W, 3].
      complete: (params, extra, key, prompts, *, sampling, max_tokens, stops, stop_at_end) ->
        ``scanax.models.generation.Generated``; None if the family does not continue texts.
      infill: (params, extra, key, texts) -> (tokens [B, T], how many of each row are the text),
        the gaps of the texts, written [[N]] for N tokens, filled; None for other families.
      decode: tokens -> text, for what ``complete`` and ``infill`` return.
      features: (params, extra, images [B, H, W, C] float32 in [-1, 1]) -> (features [B, D], logits
        [B, K]) of a classifier of images; None for other families.
      curve: the evaluation metric that is drawn, or None.
      analyses: name -> (params, extra, folder, rows, length) -> summary; writes figures and
        pictures. 0 rows or tokens is the analysis's own choice.
    """

    batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    eval_spec: Mapping[str, jax.ShapeDtypeStruct]
    param_axes: Any
    init: Callable[[jax.Array], tuple[Any, Any]]
    loss: Callable[..., tuple[jax.Array, Aux]]
    evaluate: Callable[..., Mapping[str, tuple[jax.Array, jax.Array]]]
    train_data: Callable[[int, int], Any]
    eval_data: Callable[[int], Mapping[str, Any] | None]
    frozen: tuple[str, ...] = ()
    settle: Callable[[Any], Any] = lambda extra: extra
    begin: Callable[[], None] = lambda: None
    given: Callable[[], Any] = dict
    derive: Callable[..., Mapping[str, np.ndarray]] = lambda totals, means: {}
    sample: Callable[..., Any] | None = None
    render: Callable[[Any], str | np.ndarray] | None = None
    complete: Callable[..., Any] | None = None
    infill: Callable[..., Any] | None = None
    decode: Callable[[Any], str] | None = None
    features: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    curve: Curve | None = None
    analyses: Mapping[str, Callable[..., str]] = dataclasses.field(default_factory=dict)
