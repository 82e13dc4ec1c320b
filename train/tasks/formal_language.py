"""Parity and modular arithmetic: the answer to a word, predicted at its end (state tracking).

Dimensions: B examples, T tokens, S vocabulary, L lengths.

The headline metric is scaled accuracy on words longer than any in training: 0 is guessing, 1
is always right (Siems et al. 2025, section 5).
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import params as params_lib
from ..config import Config, build as build_part
from ..data.curriculum import Curriculum
from ..data.formal import Words, language
from ..data.pipeline import Batches, eval_batch
from ..task import Aux, Curve, Task
from .models import causal_lm
from .scoring import score
from .word_problem import EVAL_STREAM, SAMPLE_STREAM

BINS = 8  # of the accuracy over lengths


@dataclasses.dataclass(frozen=True)
class FormalLanguageConfig:
    """The data of a formal language.

    Attributes:
      language: "parity", "modular_arithmetic" or "modular_arithmetic_brackets".
      modulus: of the arithmetic.
      seed: of the training words; evaluation uses ``evaluation.seed``.
      lengths: shortest and longest training word, in tokens.
      curriculum_lengths, curriculum_steps: no word is longer than ``curriculum_lengths[i]``
        from step ``curriculum_steps[i]`` on; empty for none.
      eval_lengths: the same for evaluation.
      row_tokens: of a training row, which is packed with words.
    """

    language: str
    modulus: int
    seed: int
    lengths: tuple[int, ...]
    curriculum_lengths: tuple[int, ...]
    curriculum_steps: tuple[int, ...]
    eval_lengths: tuple[int, ...]
    row_tokens: int

    def __post_init__(self):
        for name in ("lengths", "eval_lengths"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"data.{name} must be the shortest and the longest length")
        if not 0 <= self.seed < SAMPLE_STREAM:
            raise ValueError(f"data.seed must be between 0 and 2^62, got {self.seed}")


def build(config: Config) -> Task:
    """The task: a causal language model on words of ``config.data.language``."""
    data: FormalLanguageConfig = build_part(FormalLanguageConfig, config.data, "data")
    if not config.evaluation.batches:
        raise ValueError("evaluation.batches must be at least 1: words never end")
    spoken = language(data.language, data.modulus)
    vocab, what = len(spoken.vocab), f"data.language {data.language}"
    module: Any = causal_lm(config, vocab, what, segments=True).module
    example = jnp.zeros((1, 2), jnp.int32)
    shortest, longest = data.eval_lengths
    stages = (data.curriculum_lengths, data.curriculum_steps)
    curriculum = Curriculum(*stages, data.lengths[1], config.batch_size, data.lengths[0])
    train_words = Words(
        *(spoken, data.seed, _pair(data.lengths), data.row_tokens), curriculum=curriculum
    )
    single = (_pair(data.eval_lengths), longest + 2, True)
    eval_words = Words(spoken, EVAL_STREAM + config.evaluation.seed, *single)
    edges = np.linspace(shortest, longest + 1, BINS + 1).round().astype(np.int32)
    chance = 1 / spoken.modulus

    def init(key: jax.Array):
        return params_lib.initialise(module, key, example), {}

    def scores(params, batch):
        logits_BTS, _ = module.apply(
            {"params": params}, batch["ids"], segment_ids=batch["segments"]
        )
        return score(logits_BTS, batch["labels"])

    def loss(params, extra, batch, keys):
        del keys  # the model has no noise
        loss_BT, right_BT, real_BT = scores(params, batch)
        words = jnp.sum(real_BT, dtype=jnp.float32)
        return jnp.sum(loss_BT), Aux(words, extra, {"accuracy": (right_BT.sum(), words)})

    def evaluate(params, extra, batch, keys):
        del extra, keys
        loss_BT, right_BT, real_BT = scores(params, batch)
        words = jnp.sum(real_BT, dtype=jnp.float32)
        right = jnp.sum(right_BT, dtype=jnp.float32)
        bin_BT = jnp.searchsorted(edges, batch["lengths"], side="right") - 1
        count = lambda x_BT: jnp.zeros(BINS).at[bin_BT].add(x_BT.astype(jnp.float32), mode="drop")
        return {
            "loss": (jnp.sum(loss_BT), words),
            "accuracy": (right, words),
            "scaled_accuracy": (right - chance * words, (1 - chance) * words),
            "accuracy_by_length": (count(right_BT), count(real_BT)),
        }

    def sample(params, extra, key, n: int):
        """Fresh words with the model's answers: ids, labels, predictions [n, T]."""
        del extra
        seed = int(jax.random.bits(key, dtype=jnp.uint32)) + SAMPLE_STREAM
        batch = Words(spoken, seed, *single).batch(np.arange(n), np.arange(n))
        logits_BTS, _ = jax.jit(module.apply)({"params": params}, batch["ids"])
        predictions = np.asarray(jnp.argmax(logits_BTS, axis=-1))
        return {"ids": batch["ids"], "labels": batch["labels"], "predictions": predictions}

    def render(samples: Mapping[str, np.ndarray]) -> str:
        """Each word with its answer, and what the model said if that is something else."""
        lines = []
        for ids, labels, said in zip(*samples.values(), strict=True):
            end = int(np.argmax(labels >= 0))
            right, answer = spoken.vocab[labels[end]], spoken.vocab[said[end]]
            wrong = "" if answer == right else f"   wrong: {answer}"
            lines.append(f"{''.join(spoken.vocab[i] for i in ids[1 : end + 1])}{right}{wrong}")
        return "\n".join(lines)

    def spec(rows: int, tokens: int):
        names = ("ids", "labels", "segments", "lengths")
        return {name: jax.ShapeDtypeStruct((rows, tokens), jnp.int32) for name in names}

    size = config.evaluation.batch_size
    return Task(
        batch_spec=spec(config.batch_size, train_words.tokens),
        eval_spec=spec(size, eval_words.tokens),
        param_axes=params_lib.logical_axes(module, example),
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_data=lambda index, count: Batches(train_words, config.batch_size, index, count),
        eval_data=lambda index: eval_batch(eval_words, size, index),
        sample=sample,
        render=render,
        curve=Curve(
            metric="accuracy_by_length",
            x=tuple((edges[:-1] + edges[1:] - 1) / 2),
            x_label="word length (middle of the bin)",
            y_label="words answered right",
            marks={"longest in training": data.lengths[1]},
            log_x=False,
            y_range=(-0.03, 1.03),
        ),
    )


def _pair(lengths: tuple[int, ...]) -> tuple[int, int]:
    low, high = lengths
    return low, high
