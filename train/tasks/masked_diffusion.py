"""Masked diffusion: fill in masked tokens, at every fraction of masks (Ou et al. 2025).

Dimensions: B examples, T tokens, S vocabulary, N draws.

The training loss is in nats per row, as published. An evaluation estimates the bound of the
negative log-likelihood by masking sets of stratified sizes (k_dce), whatever the run's own loss,
so that runs can be compared; its error is that of its mean over rows. Rows are whole: there is no
padding, and every token counts.
"""

from collections.abc import Mapping, Sequence
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import params as params_lib, radd
from ..config import Config, build as build_part
from ..data import draws
from ..data.pipeline import IGNORE, Batch, Batches, Source
from ..data.text import Corpus, TextConfig
from ..masked_analyses import generative_perplexity, likelihood
from ..task import Aux, Task
from .masked_config import MaskedObjectiveConfig, MaskedSamplerConfig
from .masked_sampling import MaskedSampler
from .models import diffusion_lm

ESTIMATE = radd.Loss("k_dce")
LEAST_MASKED = 0.9  # at time 1, before a warning

logger = logging.getLogger("scanax")


def build(config: Config) -> Task:
    """The task: a bidirectional model on the text of ``config.data``."""
    data: TextConfig = build_part(TextConfig, config.data, "data")
    objective = build_part(MaskedObjectiveConfig, config.objective, "objective")
    sampler = build_part(MaskedSamplerConfig, config.sampler, "sampler")
    if data.layout not in ("blocks", "rows"):
        raise ValueError(f"data.layout={data.layout}: rows are whole, choose blocks or rows")
    corpus = Corpus(data)
    tokenizer = corpus.tokenizer
    mask, loss_of = tokenizer.vocab_size, objective.function
    lm = diffusion_lm(config, mask, f"data.tokenizer {data.tokenizer}")
    example, size = jnp.zeros((1, 2), jnp.int32), config.evaluation.batch_size
    bytes_S = None
    if tokenizer.byte_lengths is not None:
        bytes_S = np.asarray([*tokenizer.byte_lengths, 0], np.float32)
    masked = float(loss_of.schedule.masked(jnp.ones(())))
    if masked < LEAST_MASKED:
        logger.warning(
            "objective.schedule=%s masks only %.0f %% at time 1, and samples begin with masks"
            " alone: they are not what a loss over time trains for",
            *(objective.schedule, 100 * masked),
        )
    fits = (data.length, corpus.encode, mask)
    filler = MaskedSampler(sampler, loss_of.schedule, lm.network, *fits)

    def init(key: jax.Array):
        return params_lib.initialise(lm.module, key, example), {}

    def nats(params, ids_BT, noise: radd.Noise, loss: radd.Loss, keys=None) -> jax.Array:
        """One estimate per row [B]."""
        corruption = loss.corrupt(noise)
        noisy_BT = jnp.where(corruption.mask_BT, mask, ids_BT)
        logits_BTS = lm.apply(params, noisy_BT, keys)
        return radd.value(corruption, radd.cross_entropy(logits_BTS, ids_BT, mask))

    def figures(ids_BT, nats_B, rows_B) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Metrics of the rows that count."""
        total, rows = jnp.sum(nats_B * rows_B), jnp.sum(rows_B)
        found = {"loss": (total, rows), "nats_per_token": (total, rows * data.length)}
        if bytes_S is not None:
            bytes_B = jnp.sum(jnp.asarray(bytes_S)[ids_BT], axis=1)
            found["bits_per_byte"] = (total / math.log(2), jnp.sum(bytes_B * rows_B))
        return found

    def loss(params, extra, batch, keys):
        keys_B, dropout_B = _split(keys)
        noise = loss_of.draw(keys_B, batch["u"], data.length)
        nats_B = nats(params, batch["ids"], noise, loss_of, dropout_B)
        metrics = figures(batch["ids"], nats_B, jnp.ones_like(nats_B))
        value, weight = metrics.pop("loss")
        return value, Aux(weight, extra, metrics)

    def estimates(params, batch, keys, loss: radd.Loss, draws: int, stratified: bool) -> jax.Array:
        """[N, B]: independent draws, or, of k_dce, such of stratified sizes."""
        sizes_B, keys_B = _split(keys)
        if stratified:
            sizes_BN = radd.times.stratified_sizes(sizes_B, draws, data.length)
            u_NB = radd.times.uniform_of(sizes_BN, data.length).T
        else:
            u_NB = jax.vmap(lambda key: jax.random.uniform(key, (draws,)))(sizes_B).T

        def one(_, inputs):
            number, u_B = inputs
            here_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
            noise = loss.draw(here_B, u_B, data.length)
            return None, nats(params, batch["ids"], noise, loss)

        return jax.lax.scan(one, None, (jnp.arange(draws, dtype=jnp.uint32), u_NB))[1]

    def evaluate(params, extra, batch, keys):
        del extra
        draws = objective.eval_draws
        nats_NB = estimates(params, batch, keys, ESTIMATE, draws, stratified=True)
        nats_B = jnp.mean(nats_NB, axis=0)
        rows_B = jnp.any(batch["labels"] != IGNORE, axis=1).astype(nats_B.dtype)
        found = figures(batch["ids"], nats_B, rows_B)
        return {**found, "nats_squared": (jnp.sum(nats_B**2 * rows_B), jnp.sum(rows_B))}

    def derive(totals, means):
        """Perplexity, and the standard error of nats per token over the rows."""
        rows = float(totals["loss"][1])
        variance = max(float(means["nats_squared"] - means["loss"] ** 2), 0.0)
        error = math.sqrt(variance / (rows - 1)) / data.length if rows > 1 else math.nan
        return {
            "perplexity": np.exp(means["nats_per_token"]),
            "standard_error": np.asarray(error),
        }

    def sample(params, extra, key, n: int) -> np.ndarray:
        """[n, data.length] tokens."""
        del extra
        start_RT = np.full((n, data.length), mask, np.int32)
        return filler.fill(params, radd.draws.row_keys(key, n), start_RT)

    def render(samples: Sequence[np.ndarray]) -> str:
        parts = [f"--- {i} ---\n{tokenizer.decode(ids)}" for i, ids in enumerate(samples)]
        return "\n".join(parts)

    def spec(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("ids", "labels", "segments", "positions")
        return {name: jax.ShapeDtypeStruct((rows, data.length), jnp.int32) for name in names}

    def train_data(process_index: int, process_count: int) -> Batches:
        _ = corpus.eval_source  # what is wrong with it is said at once
        seed = draws.stream(config.seed, "times")
        source = _Timed(corpus.train_source(config.batch_size), seed, config, objective.draw)
        return Batches(source, config.batch_size, process_index, process_count, seed=data.seed)

    analyses = {
        "likelihood": functools.partial(
            likelihood,
            estimates,
            corpus.eval_batch,
            size,
            loss_of,
            sampler.likelihood_draws,
            data.length,
        ),
        "generative_perplexity": functools.partial(
            generative_perplexity, sample, tokenizer, sampler.scorer
        ),
    }
    return Task(
        batch_spec={
            **spec(config.batch_size),
            "u": jax.ShapeDtypeStruct((config.batch_size,), jnp.float32),
        },
        eval_spec=spec(size),
        param_axes=params_lib.logical_axes(lm.module, example),
        init=init,
        loss=loss,
        evaluate=evaluate,
        derive=derive,
        train_data=train_data,
        eval_data=functools.partial(corpus.eval_batch, size),
        sample=sample,
        render=render,
        complete=functools.partial(
            filler.complete, end=tokenizer.end if data.end_of_document else None
        ),
        infill=filler.infill,
        decode=tokenizer.decode,
        analyses=analyses,
    )


class _Timed:
    """Rows, and for each its number u in [0, 1), drawn over the whole batch at once."""

    def __init__(self, source: Source, seed: int, config: Config, how: str):
        self._source, self._seed, self._batch, self._how = source, seed, config.batch_size, how
        self.identity: Mapping[str, Any] = {**source.identity, "times": how, "times_seed": seed}

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        steps_R, rows_R = np.divmod(draws, self._batch)
        u_R = np.empty(len(draws), np.float32)
        for step in np.unique(steps_R):
            here_R = steps_R == step
            u_R[here_R] = self._of_step(int(step))[rows_R[here_R]]
        return {**self._source.batch(records, draws), "u": u_R}

    def _of_step(self, step: int) -> np.ndarray:
        numbers = step * self._batch + np.arange(self._batch)
        w_B = draws.uniform(self._seed, numbers, 1)[:, 0]
        last = np.float32(1 - np.finfo(np.float32).epsneg)
        return np.minimum(radd.times.from_uniform(self._how, w_B).astype(np.float32), last)


def _split(keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys of each."""
    fold = lambda number: jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
    return fold(0), fold(1)
