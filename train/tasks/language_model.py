"""Language modelling: predict the next token of text.

Dimensions: B examples, T tokens, S vocabulary.

Loss is in nats per token. Bits per byte, sum of bits over UTF-8 bytes of the predicted
tokens, compares models with different tokenizers.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ...models import params as params_lib
from ...models.delta_product import DeltaProductConfig, DeltaProductLM
from ..config import Config, build as build_part
from ..data.text import Corpus, TextConfig
from ..task import Aux, Task
from .scoring import score


def build(config: Config) -> Task:
    """The task: a DeltaProduct language model on the text of ``config.data``."""
    data: TextConfig = build_part(TextConfig, config.data, "data")
    if data.layout == "streams":
        raise ValueError(
            "data.layout=streams is for models that carry a cache from batch to batch; choose"
            " packed or blocks"
        )
    corpus = Corpus(data)
    tokenizer = corpus.tokenizer
    model: DeltaProductConfig = build_part(
        DeltaProductConfig,
        {**config.model, "vocab_size": config.model.get("vocab_size") or tokenizer.vocab_size},
        "model",
    )
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size ({model.vocab_size}) is smaller than the {tokenizer.vocab_size}"
            f" tokens of data.tokenizer {data.tokenizer}; 0 picks it"
        )
    module = DeltaProductLM(model)
    example = jnp.zeros((1, 2), jnp.int32)
    start = 0 if tokenizer.end is None else tokenizer.end
    bytes_S = None
    if tokenizer.byte_lengths is not None:
        bytes_S = np.zeros(model.vocab_size, np.float32)
        bytes_S[: tokenizer.vocab_size] = tokenizer.byte_lengths

    def init(key: jax.Array):
        return params_lib.initialise(module, key, example), {}

    def sums(params, batch):
        """Name -> (sum, weight) over the tokens that have a label."""
        segments = batch["segments"] if data.layout == "packed" else None
        logits_BTS, _ = module.apply({"params": params}, batch["ids"], segment_ids=segments)
        loss_BT, right_BT, real_BT = score(logits_BTS, batch["labels"])
        loss = jnp.sum(loss_BT)
        tokens = jnp.sum(real_BT, dtype=jnp.float32)
        found = {"loss": (loss, tokens), "token_accuracy": (jnp.sum(right_BT), tokens)}
        if bytes_S is not None:
            bytes_BT = jnp.where(real_BT, jnp.asarray(bytes_S)[batch["labels"]], 0.0)
            found["bits_per_byte"] = (loss / jnp.log(2.0), jnp.sum(bytes_BT))
        return found

    def loss(params, extra, batch, keys):
        del keys  # the model has no noise
        metrics = sums(params, batch)
        value, weight = metrics.pop("loss")
        return value, Aux(weight, extra, metrics)

    def evaluate(params, extra, batch, keys):
        del extra, keys
        return sums(params, batch)

    @functools.partial(jax.jit, static_argnums=2)
    def generate(params, key, n: int):
        """[n, T] tokens drawn one after another, beginning a document."""
        apply = functools.partial(module.apply, {"params": params})
        logits_nTS, cache = apply(jnp.full((n, 1), start, jnp.int32))

        def draw(carry, key):
            logits_nS, cache = carry
            tokens_n = jax.random.categorical(key, logits_nS[:, : tokenizer.vocab_size])
            logits_nTS, cache = apply(tokens_n[:, None], cache=cache)
            return (logits_nTS[:, -1], cache), tokens_n

        keys = jax.random.split(key, data.length)
        _, tokens_Tn = jax.lax.scan(draw, (logits_nTS[:, -1], cache), keys)
        return tokens_Tn.T

    def sample(params, extra, key, n: int) -> np.ndarray:
        del extra
        return np.asarray(generate(params, key, n))

    def render(samples: Sequence[np.ndarray]) -> str:
        parts = [f"--- {i} ---\n{tokenizer.decode(ids)}" for i, ids in enumerate(samples)]
        return "\n".join(parts)

    def spec(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("ids", "labels", "segments", "positions")
        return {name: jax.ShapeDtypeStruct((rows, data.length), jnp.int32) for name in names}

    size = config.evaluation.batch_size
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
