"""Language modelling: predict the next token of text.

Dimensions: B examples, T tokens, S vocabulary.

Loss is in nats per token. Bits per byte, sum of bits over UTF-8 bytes of the predicted
tokens, compares models with different tokenizers.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import generation, params as params_lib
from ..config import Config, ConfigError, build as build_part
from ..data.pipeline import DataError
from ..data.text import Corpus, TextConfig
from ..long_context import measure, write_report
from ..routing import Routed, routing
from ..saturation import saturation
from ..task import Aux, Task
from .models import causal_lm
from .scoring import score


def build(config: Config) -> Task:
    """The task: a causal language model on the text of ``config.data``."""
    data: TextConfig = build_part(TextConfig, config.data, "data")
    corpus = Corpus(data)
    tokenizer = corpus.tokenizer
    packed, vocabulary = data.layout == "packed", f"data.tokenizer {data.tokenizer}"
    lm = causal_lm(config, tokenizer.vocab_size, vocabulary, segments=packed, penalised=True)
    streams, size = data.layout == "streams", config.evaluation.batch_size
    if streams and not lm.carries:
        raise ConfigError(
            f"data.layout=streams is for models that carry a cache from batch to batch, and family"
            f" {config.family} with this config has none that could: choose packed or blocks"
        )
    first = lambda rows: lm.empty_cache(rows, data.length)  # of streams
    module: Any = lm.module
    evaluated: Any = lm.evaluated or module
    example = jnp.zeros((1, 2), jnp.int32)
    start = 0 if tokenizer.end is None else tokenizer.end
    bytes_S = None
    if tokenizer.byte_lengths is not None:
        bytes_S = np.zeros(lm.config.vocab_size, np.float32)
        bytes_S[: tokenizer.vocab_size] = tokenizer.byte_lengths

    def init(key: jax.Array):
        extra = {name: module.init(key, example)[name] for name in lm.state}
        if streams:
            extra["rows"] = first(config.batch_size)
        return params_lib.initialise(module, key, example), extra

    def variables(params, extra):
        return {"params": params, **{name: extra[name] for name in lm.state}}

    def forward(module, params, extra, batch, cache=None, keys=None, changed=()):
        """Name -> (sum, weight) over the tokens that have a label, the penalty per token, and the
        cache and the collections ``changed`` after the batch."""
        options = {"segment_ids": batch["segments"]} if packed else {}
        if data.layout in ("packed", "padded") and lm.masked:
            options["mask"] = batch["segments"] > 0
        if cache is not None:
            options["cache"] = cache
        if lm.noisy:
            options["keys"] = keys
        (logits_BTS, cache), filled = module.apply(
            variables(params, extra),
            batch["ids"],
            **options,
            mutable=[*lm.collections, *changed],
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
        return found, penalty, cache, {name: filled[name] for name in changed}

    def loss(params, extra, batch, keys):
        cache = _begun(extra["rows"], first, batch["reset"]) if streams else None
        metrics, penalty, cache, state = forward(
            module, params, extra, batch, cache, keys, lm.state
        )
        value, weight = metrics.pop("loss")
        if streams:
            state["rows"] = jax.lax.stop_gradient(cache)
        return value + weight * penalty, Aux(weight, {**extra, **state}, metrics)

    def evaluate(params, extra, batch, keys):
        del keys
        if not streams:
            return forward(evaluated, params, extra, batch)[0]

        def block(cache, batch):
            found, _, cache, _ = forward(evaluated, params, extra, batch, cache)
            return cache, found

        cut = lambda x_BN: x_BN.reshape(size, -1, data.length).swapaxes(0, 1)
        _, found = jax.lax.scan(block, first(size), jax.tree.map(cut, dict(batch)))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), found)

    def apply(variables, ids, mask, cache):
        return evaluated.apply(variables, ids, mask=mask, cache=cache, last_only=True)

    def complete(
        params,
        extra,
        key,
        prompts: Sequence[str],
        *,
        sampling: generation.Sampling | None = None,
        max_tokens: int,
        stops: Sequence[str] = (),
        stop_at_end: bool = True,
    ) -> generation.Generated:
        """Continues texts; an empty one begins a document."""
        ends = [[tokenizer.end]] if stop_at_end and tokenizer.end is not None else []
        return generation.generate(
            apply,
            variables(params, extra),
            lm.empty_cache,
            [corpus.encode(text) if text else np.asarray([start], np.int32) for text in prompts],
            key,
            vocab_size=tokenizer.vocab_size,
            max_tokens=max_tokens,
            sampling=sampling or generation.Sampling(),
            stops=[*ends, *(corpus.encode(text).tolist() for text in stops)],
        )

    def sample(params, extra, key, n: int) -> np.ndarray:
        """[n, data.length] tokens, each row beginning a document."""
        free = {"sampling": generation.Sampling(), "stop_at_end": False}
        rows = complete(params, extra, key, [""] * n, max_tokens=data.length, **free).tokens
        return np.stack(rows)

    def long_context(states, params, extra, folder: pathlib.Path, rows: int, length: int) -> str:
        """Loss and effective rank over positions, up to 32 times the training length and beyond."""
        length = length or 32 * data.length
        length -= length % data.length
        window = eval_rows(rows or 8, length)
        rows = len(window)
        found = measure(
            lambda params, ids, cache: evaluated.apply(params, ids, cache=cache),
            variables(params, extra),
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

    def probe_routers(params, extra, folder: pathlib.Path, rows: int, length: int) -> str:
        """What the routers do, in batches of as many rows as training computes at once.

        Streams come behind as much text as the model sees, read without gradients.
        """
        before = lm.config.span if streams else 0

        def apply(params, ids):
            options = {"mutable": [*lm.collections, lm.routing]}
            if streams:
                past = jax.lax.stop_gradient(variables(params, extra)), ids[:, :before]
                options["cache"] = module.apply(*past, cache=first(len(ids)))[1]
            now = variables(params, extra), ids[:, before:]
            (logits, _), found = module.apply(*now, **options)
            return logits, found

        balance = lambda found: lm.penalties(found)["balance_loss"][1]
        size = config.batch_size // config.microbatches
        window = eval_rows(rows or 8 * size, before + (length or data.length))
        return routing(Routed(lm.config, apply, balance), params, window, size, folder)

    analyses = {}
    if lm.states is not None:
        analyses["long_context"] = functools.partial(long_context, lm.states)
    if config.family == "lightnet" and lm.config.mixer == "lightnet":
        analyses["saturation"] = probe_keys
    if lm.routing:
        analyses["routing"] = probe_routers

    def render(samples: Sequence[np.ndarray]) -> str:
        parts = [f"--- {i} ---\n{tokenizer.decode(ids)}" for i, ids in enumerate(samples)]
        return "\n".join(parts)

    def spec(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("ids", "labels", "segments", "positions")
        return {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}

    batch_spec, eval_spec = spec(config.batch_size, data.length), spec(size, data.length)
    eval_data = functools.partial(corpus.eval_batch, size)
    if streams:
        batch_spec["reset"] = jax.ShapeDtypeStruct((config.batch_size,), jnp.bool_)
        whole = corpus.eval_streams(size, config.evaluation.batches)
        eval_spec = spec(size, whole["ids"].shape[1])
        eval_data = lambda index: None if index else whole
    return Task(
        batch_spec=batch_spec,
        eval_spec=eval_spec,
        param_axes=params_lib.logical_axes(module, example),
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_data=functools.partial(corpus.train_batches, config.batch_size),
        eval_data=eval_data,
        frozen=lm.frozen,
        settle=lm.settle,
        sample=sample if lm.has_cache else None,
        render=render,
        complete=complete if lm.has_cache else None,
        decode=tokenizer.decode,
        analyses=analyses,
    )


def _begun(cache: Any, empty: Callable[[int], Any], reset_B: jax.Array) -> Any:
    """The cache [B, ...] with the rows that begin anew emptied."""

    def pick(new, old):
        return jnp.where(jnp.expand_dims(reset_B, range(1, old.ndim)), new, old)

    return jax.tree.map(pick, empty(len(reset_B)), cache)
