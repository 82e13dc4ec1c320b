"""Masked language modelling: fill in tokens of a text, seeing what stands on both sides.

Dimensions: B examples, T tokens, S vocabulary.

Some of the tokens are predicted (Devlin et al. 2019). Of these, 80 % are replaced by a mask token,
10 % by a random one, and 10 % are left as they are, so that the model cannot rely on the mask.
Loss is in nats per predicted token. Rows may be padded: padding is neither seen nor predicted.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import params as params_lib
from ..config import Config, build as build_part
from ..data.pipeline import IGNORE
from ..data.text import Corpus, TextConfig
from ..task import Aux, Task
from .models import masked_lm
from .scoring import score

MASKED, RANDOM = 0.8, 0.1  # of the predicted tokens


@dataclasses.dataclass(frozen=True)
class MaskedTextConfig(TextConfig):
    """Text whose tokens are to be filled in.

    Attributes:
      mask_rate: of the tokens, to be predicted.
    """

    mask_rate: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"data.mask_rate must be in (0, 1], got {self.mask_rate}")
        if self.layout not in ("padded", "blocks", "rows"):
            raise ValueError(
                f"data.layout={self.layout}: a masked language model sees its whole row, so it"
                " needs one text per row: choose padded or blocks"
            )


def build(config: Config) -> Task:
    """The task: a bidirectional model on the text of ``config.data``."""
    data: MaskedTextConfig = build_part(MaskedTextConfig, config.data, "data")
    corpus = Corpus(data)
    tokenizer = corpus.tokenizer
    mask_token = tokenizer.vocab_size
    vocabulary = f"data.tokenizer {data.tokenizer} with the mask"
    _, lm = masked_lm(config, tokenizer.vocab_size + 1, vocabulary)
    module: Any = lm
    example = jnp.zeros((1, 2), jnp.int32)
    size = config.evaluation.batch_size

    def init(key: jax.Array):
        return params_lib.initialise(module, key, example), {}

    def predict(params, batch, keys):
        """Logits [B, T, S], the tokens with noise, and the labels, both [B, T]."""
        real_BT = batch["segments"] > 0
        noisy_BT, labels_BT = mask_tokens(
            batch["ids"], real_BT, keys, data.mask_rate, mask_token, tokenizer.vocab_size
        )
        logits_BTS, _ = module.apply({"params": params}, noisy_BT, mask=real_BT)
        counts_B = jnp.any(batch["labels"] != IGNORE, axis=1)  # rows that fill a batch up do not
        return logits_BTS, noisy_BT, jnp.where(counts_B[:, None], labels_BT, IGNORE)

    def evaluate(params, extra, batch, keys):
        del extra
        logits_BTS, _, labels_BT = predict(params, batch, keys)
        loss_BT, right_BT, chosen_BT = score(logits_BTS, labels_BT)
        tokens = jnp.sum(chosen_BT, dtype=jnp.float32)
        return {"loss": (jnp.sum(loss_BT), tokens), "token_accuracy": (jnp.sum(right_BT), tokens)}

    def loss(params, extra, batch, keys):
        metrics = evaluate(params, extra, batch, keys)
        value, weight = metrics.pop("loss")
        return value, Aux(weight, extra, metrics)

    def sample(params, extra, key, n: int) -> Mapping[str, np.ndarray]:
        """Rows of the evaluation text, filled in: noisy, labels, predictions [n, T]."""
        del extra
        batch = corpus.eval_batch(n, 0)
        assert batch is not None  # an evaluation text has rows
        logits_BTS, noisy_BT, labels_BT = jax.jit(predict)(params, batch, jax.random.split(key, n))
        noisy_BT = jnp.where(batch["segments"] > 0, noisy_BT, IGNORE)
        found = {"noisy": noisy_BT, "labels": labels_BT, "predictions": logits_BTS.argmax(-1)}
        return jax.tree.map(np.asarray, found)

    def render(samples: Mapping[str, np.ndarray]) -> str:
        """The text with every predicted token in brackets: [right], or [wrong instead of right]."""
        lines = []
        rows = zip(*(samples[n] for n in ("noisy", "labels", "predictions")), strict=True)
        for i, (noisy, labels, said) in enumerate(rows):
            parts = []
            for shown, label, guess in zip(noisy, labels, said, strict=True):
                if label == IGNORE:
                    parts.append(text(shown) if shown != IGNORE else "")
                else:
                    wrong = "" if guess == label else f"{text(guess)} for "
                    parts.append(f"[{wrong}{text(label)}]")
            lines += [f"--- {i} ---", "".join(parts)]
        return "\n".join(lines)

    def text(token: int) -> str:
        return "_" if token >= mask_token else tokenizer.decode(np.asarray([token]))

    def spec(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("ids", "labels", "segments", "positions")
        return {name: jax.ShapeDtypeStruct((rows, data.length), jnp.int32) for name in names}

    return Task(
        batch_spec=spec(config.batch_size),
        eval_spec=spec(size),
        param_axes=params_lib.logical_axes(module, example),
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_data=functools.partial(corpus.train_batches, config.batch_size),
        eval_data=functools.partial(corpus.eval_batch, size),
        sample=sample,
        render=render,
    )


def mask_tokens(
    ids: jax.Array, real: jax.Array, keys: jax.Array, rate: float, mask_token: int, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Chooses tokens to predict and hides most of them.

    Args:
      ids: [B, T] int32.
      real: [B, T] bool, False for padding.
      keys: [B] PRNG keys; a row's noise depends on its key alone.
      rate: probability that a token is chosen.
      mask_token: stands for a hidden one.
      tokens: random ones are below this number.

    Returns:
      The tokens to show [B, T] int32, and those to predict, IGNORE where nothing is.
    """

    def row(key, ids_T):
        key, other = jax.random.split(key)
        chosen, how = jax.random.uniform(key, (2, *ids_T.shape))
        return chosen, how, jax.random.randint(other, ids_T.shape, 0, tokens, ids_T.dtype)

    chosen_BT, how_BT, random_BT = jax.vmap(row)(keys, ids)
    chosen_BT = (chosen_BT < rate) & real
    noisy_BT = jnp.where(how_BT < MASKED + RANDOM, random_BT, ids)
    noisy_BT = jnp.where(how_BT < MASKED, mask_token, noisy_BT)
    return jnp.where(chosen_BT, noisy_BT, ids), jnp.where(chosen_BT, ids, IGNORE)
