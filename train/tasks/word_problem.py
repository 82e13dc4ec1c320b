"""Group word problems: predict every prefix product of a random word (state tracking).

Dimensions: B examples, T tokens (BOS and elements), S vocabulary.

The headline metric is sequence accuracy at length L: the fraction of words whose first L
predictions are all right (Siems et al. 2025, section 5).
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import params as params_lib
from ...models.delta_product.groups import group
from ..config import Config, build as build_part
from ..data import word_problem as words
from ..data.pipeline import IGNORE, Batches, eval_batch
from ..task import Aux, Curve, Task
from .models import causal_lm
from .scoring import score

# Words are keyed by a 64-bit seed; training seeds are below 2^62, so that no word of an
# evaluation or a sample is drawn with a training key.
SAMPLE_STREAM, EVAL_STREAM = 2**62, 2**63


@dataclasses.dataclass(frozen=True)
class WordProblemConfig:
    """The data of a word problem.

    Attributes:
      group: "S3", "S4", "A5" or "S5".
      seed: of the training words; evaluation uses ``evaluation.seed``.
      length: elements per training row, BOS not counted.
      curriculum_lengths, curriculum_steps: words of ``curriculum_lengths[i]`` elements from
        step ``curriculum_steps[i]`` on, packed into the rows; empty for none.
      eval_lengths: lengths at which accuracy is reported; the longest is what is run.
      limit_to, only_swaps, tokens_per_element: variants, see ``WordProblems``.
    """

    group: str
    seed: int
    length: int
    curriculum_lengths: tuple[int, ...]
    curriculum_steps: tuple[int, ...]
    eval_lengths: tuple[int, ...]
    limit_to: int
    only_swaps: bool
    tokens_per_element: int

    def __post_init__(self):
        if self.length < 1 or not self.eval_lengths or min(self.eval_lengths) < 1:
            raise ValueError("data.length and data.eval_lengths must be positive")
        if not 0 <= self.seed < SAMPLE_STREAM:
            raise ValueError(f"data.seed must be between 0 and 2^62, got {self.seed}")


def build(config: Config) -> Task:
    """The task: a causal language model on words over ``config.data.group``."""
    data: WordProblemConfig = build_part(WordProblemConfig, config.data, "data")
    if not config.evaluation.batches:
        raise ValueError("evaluation.batches must be at least 1: words never end")
    vocab = words.vocab_size(group(data.group))
    packed = bool(data.curriculum_lengths)
    module: Any = causal_lm(config, vocab, f"data.group {data.group}", segments=packed).module
    example = jnp.zeros((1, 2), jnp.int32)
    longest, repeat = max(data.eval_lengths), data.tokens_per_element
    variant = (data.limit_to, data.only_swaps, repeat)
    train_words = words.WordProblems(
        *(data.group, data.seed, data.length, config.batch_size),
        *(data.curriculum_lengths, data.curriculum_steps),
        *variant,
    )

    def whole_words(seed: int) -> words.WordProblems:
        """One word of the longest length per row."""
        return words.WordProblems(data.group, seed, longest, 1, (), (), *variant)

    eval_words = whole_words(EVAL_STREAM + config.evaluation.seed)
    eval_size = config.evaluation.batch_size

    def init(key: jax.Array):
        return params_lib.initialise(module, key, example), {}

    def loss(params, extra, batch, keys):
        del keys  # the model has no noise
        segments = batch["segments"] if packed else None
        logits_BTS, _ = module.apply({"params": params}, batch["ids"], segment_ids=segments)
        loss_BT, right_BT, real_BT = score(logits_BTS, batch["labels"])
        weight = jnp.sum(real_BT, dtype=jnp.float32)
        return jnp.sum(loss_BT), Aux(weight, extra, {"token_accuracy": (right_BT.sum(), weight)})

    def evaluate(params, extra, batch, keys):
        del extra, keys
        logits_BTS, _ = module.apply({"params": params}, batch["ids"])
        loss_BT, right_BT, real_BT = score(logits_BTS, batch["labels"])
        right_BL = right_BT[:, repeat::repeat]  # where products are due; not BOS
        so_far_BL = jnp.cumprod(right_BL, axis=1, dtype=jnp.float32)
        rows = jnp.asarray(right_BL.shape[0], jnp.float32)
        metrics = {
            "loss": (loss_BT.sum(), jnp.sum(real_BT, dtype=jnp.float32)),
            "token_accuracy": (right_BL.sum(), jnp.asarray(right_BL.size, jnp.float32)),
            "accuracy_by_length": (so_far_BL.sum(0), rows),
        }
        for length in data.eval_lengths:
            metrics[f"sequence_accuracy_{length}"] = (so_far_BL[:, length - 1].sum(), rows)
        return metrics

    def sample(params, extra, key, n: int):
        """Fresh words with the model's predictions: ids, labels, predictions [n, T]."""
        del extra
        seed = int(jax.random.bits(key, dtype=jnp.uint32)) + SAMPLE_STREAM
        batch = whole_words(seed).batch(np.arange(n), np.arange(n))
        logits_BTS, _ = jax.jit(module.apply)({"params": params}, batch["ids"])
        predictions = np.asarray(jnp.argmax(logits_BTS, axis=-1))
        return {"ids": batch["ids"], "labels": batch["labels"], "predictions": predictions}

    def spec(rows: int, tokens: int):
        names = ("ids", "labels", "segments")
        return {name: jax.ShapeDtypeStruct((rows, tokens), jnp.int32) for name in names}

    return Task(
        batch_spec=spec(config.batch_size, train_words.tokens),
        eval_spec=spec(eval_size, eval_words.tokens),
        param_axes=params_lib.logical_axes(module, example),
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_data=lambda index, count: Batches(train_words, config.batch_size, index, count),
        eval_data=lambda index: eval_batch(eval_words, eval_size, index),
        sample=sample,
        render=render,
        curve=Curve(
            metric="accuracy_by_length",
            x=tuple(range(1, longest + 1)),
            x_label="word length",
            y_label="words with every product right",
            marks={"training length": data.length},
            y_range=(-0.03, 1.03),
        ),
    )


def render(samples: Mapping[str, np.ndarray]) -> str:
    """Words that went wrong: where, and what the model said around the first error."""
    ids, labels, predictions = (samples[k] for k in ("ids", "labels", "predictions"))
    right = (predictions == labels)[:, 1:] | (labels[:, 1:] == IGNORE)
    lines = [f"{int(right.all(1).sum())} of {len(ids)} words of {right.shape[1]} tokens right"]
    for row in np.flatnonzero(~right.all(1)):
        first = int(np.argmin(right[row])) + 1  # position in the row, BOS being 0
        around = slice(max(1, first - 4), first + 5)
        lines += [
            f"word {row}: first error at token {first}, {int((~right[row]).sum())} wrong",
            f"  tokens      {_row(ids[row, around])}",
            f"  products    {_row(labels[row, around])}",
            f"  predictions {_row(predictions[row, around])}",
        ]
    return "\n".join(lines)


def _row(tokens: np.ndarray) -> str:
    return " ".join(f"{token:3d}" for token in tokens)
