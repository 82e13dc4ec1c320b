"""Language modelling: predict the next token of text.

Dimensions: B examples, T tokens, S vocabulary.

Loss is in nats per token. Bits per byte, sum of bits over UTF-8 bytes of the predicted
tokens, compares models with different tokenizers.
"""

from collections.abc import Sequence
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import generation, params as params_lib
from ..config import Config, build as build_part
from ..data.pipeline import DataError
from ..data.text import Corpus, TextConfig
from ..long_context import measure, write_report
from ..saturation import saturation
from ..task import Aux, Task
from .models import causal_lm
from .scoring import score


def build(config: Config) -> Task:
    """The task: a causal language model on the text of ``config.data``."""
    data: TextConfig = build_part(TextConfig, config.data, "data")
    if data.layout == "streams":
        raise ValueError(
            "data.layout=streams is for models that carry a cache from batch to batch; choose"
            " packed or blocks"
        )
    corpus = Corpus(data)
    tokenizer = corpus.tokenizer
    packed, vocabulary = data.layout == "packed", f"data.tokenizer {data.tokenizer}"
    lm = causal_lm(config, tokenizer.vocab_size, vocabulary, segments=packed, penalised=True)
    module: Any = lm.module
    example = jnp.zeros((1, 2), jnp.int32)
    start = 0 if tokenizer.end is None else tokenizer.end
    bytes_S = None
    if tokenizer.byte_lengths is not None:
        bytes_S = np.zeros(lm.config.vocab_size, np.float32)
        bytes_S[: tokenizer.vocab_size] = tokenizer.byte_lengths

    def init(key: jax.Array):
        return params_lib.initialise(module, key, example), {}

    def sums(params, batch):
        """Name -> (sum, weight) over the tokens that have a label, and the penalty per token."""
        options = {"segment_ids": batch["segments"]} if packed else {}
        if packed and lm.masked:
            options["mask"] = batch["segments"] > 0
        (logits_BTS, _), filled = module.apply(
            {"params": params}, batch["ids"], **options, mutable=list(lm.collections)
        )
        loss_BT, right_BT, real_BT = score(logits_BTS, batch["labels"])
        loss = jnp.sum(loss_BT)
        tokens = jnp.sum(real_BT, dtype=jnp.float32)
        found = {"loss": (loss, tokens), "token_accuracy": (jnp.sum(right_BT), tokens)}
        if bytes_S is not None:
            bytes_BT = jnp.where(real_BT, jnp.asarray(bytes_S)[batch["labels"]], 0.0)
            found["bits_per_byte"] = (loss / jnp.log(2.0), jnp.sum(bytes_BT))
        penalty = jnp.zeros(())
        for name, (coefficient, value) in lm.penalties(filled).items():
            if coefficient:
                found[name] = (tokens * value, tokens)
                penalty += coefficient * value
        return found, penalty

    def loss(params, extra, batch, keys):
        del keys  # the model has no noise
        metrics, penalty = sums(params, batch)
        value, weight = metrics.pop("loss")
        return value + weight * penalty, Aux(weight, extra, metrics)

    def evaluate(params, extra, batch, keys):
        del extra, keys
        return sums(params, batch)[0]

    def apply(params, ids, mask, cache):
        return module.apply({"params": params}, ids, mask=mask, cache=cache, last_only=True)

    def complete(
        params,
        extra,
        key,
        prompts: Sequence[str],
        *,
        sampling: generation.Sampling,
        max_tokens: int,
        stops: Sequence[str] = (),
        stop_at_end: bool = True,
    ) -> generation.Generated:
        """Continues texts; an empty one begins a document."""
        del extra
        ends = [[tokenizer.end]] if stop_at_end and tokenizer.end is not None else []
        return generation.generate(
            apply,
            params,
            lm.empty_cache,
            [encode(text) if text else np.asarray([start], np.int32) for text in prompts],
            key,
            vocab_size=tokenizer.vocab_size,
            max_tokens=max_tokens,
            sampling=sampling,
            stops=[*ends, *(encode(text).tolist() for text in stops)],
        )

    def encode(text: str) -> np.ndarray:
        """Tokens of a text; a DataError if the vocabulary has no token for some of it."""
        ids = tokenizer.encode(text)
        if tokenizer.unknown is not None and tokenizer.unknown in ids:
            strange = [c for c in sorted(set(text)) if tokenizer.unknown in tokenizer.encode(c)]
            raise DataError(
                f"data.tokenizer {data.tokenizer} has no token for"
                f" {', '.join(map(repr, strange)) or 'part of the text'}: write it without"
            )
        return ids

    def sample(params, extra, key, n: int) -> np.ndarray:
        """[n, data.length] tokens, each row beginning a document."""
        free = {"sampling": generation.Sampling(), "stop_at_end": False}
        rows = complete(params, extra, key, [""] * n, max_tokens=data.length, **free).tokens
        return np.stack(rows)

    def long_context(states, params, extra, folder: pathlib.Path, rows: int, length: int) -> str:
        """Loss and effective rank over positions, up to 32 times the training length and beyond."""
        del extra
        length = length or 32 * data.length
        length -= length % data.length
        window = eval_rows(rows or 8, length)
        rows = len(window)
        found = measure(
            lambda params, ids, cache: module.apply({"params": params}, ids, cache=cache),
            params,
            lm.empty_cache(rows, length),
            states,
            window,
            data.length,
        )
        per_token, unit = np.log(2.0), "bits per token"
        if tokenizer.byte_lengths is not None:
            used = corpus.eval_tokens[: rows * length + 1]
            per_token *= float(tokenizer.byte_lengths[used].mean())
            unit = "bits per byte"
        return write_report(found, float(per_token), unit, data.length, folder)

    def eval_rows(rows: int, length: int) -> np.ndarray:
        """[rows, length + 1] tokens of the evaluation text, fewer rows if it is short."""
        ids = corpus.eval_tokens
        if length < 1 or len(ids) < length + 1:
            raise DataError(
                f"--length must be {data.length} to {len(ids) - 1} tokens: the evaluation text has"
                f" {len(ids)}; set data.eval_path in the run's config for a longer one"
            )
        rows = min(rows, (len(ids) - 1) // length)
        return ids[np.arange(rows)[:, None] * length + np.arange(length + 1)[None]]

    def probe_keys(params, extra, folder: pathlib.Path, rows: int, length: int) -> str:
        """How much of LightNet's state every new token replaces, over positions."""
        del extra
        window = eval_rows(rows or 8, length or 8 * data.length)[:, :-1].astype(np.int32)
        return saturation(lm.module, params, window, data.length, folder)

    analyses = {}
    if lm.states is not None:
        analyses["long_context"] = functools.partial(long_context, lm.states)
    if config.family == "lightnet" and lm.config.mixer == "lightnet":
        analyses["saturation"] = probe_keys

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
        sample=sample if lm.has_cache else None,
        render=render,
        complete=complete if lm.has_cache else None,
        decode=tokenizer.decode,
        analyses=analyses,
    )
