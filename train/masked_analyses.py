"""What a masked diffusion is measured by beside its evaluation.

Dimensions: B rows of a batch, R rows, N draws, T tokens.

likelihood            the bound as Ou et al. 2025 estimate it, and with stratified sizes
generative_perplexity samples as a causal model sees them, and how varied they are
"""

from collections.abc import Callable
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models import radd
from .config import ConfigError, build as build_part
from .data.pipeline import IGNORE
from .data.text import Corpus, TextConfig

SEED = 20_000
AT_ONCE = 8  # samples that are scored together


def likelihood(
    estimates: Callable[..., jax.Array],
    eval_batch: Callable[[int, int], Any],
    size: int,
    loss: radd.Loss,
    draws: int,
    length: int,
    params: Any,
    extra: Any,
    folder: pathlib.Path,
    rows: int,
    unused_length: int,
) -> str:
    """Perplexity by ``draws`` independent draws of the run's loss for every row,
    as published, and by as many of stratified sizes; with the standard errors of both.

    The error over draws is that of the estimate for these rows, the other that of the rows, null
    for a single one. The variance of lambda_dce is infinite: do not trust its error over draws.
    """
    del extra, unused_length
    found = {}
    for name, which in (("published", loss), ("stratified", radd.Loss("k_dce"))):
        compute = jax.jit(
            lambda params, batch, keys, which=which, name=name: estimates(
                params, batch, keys, which, draws, stratified=name == "stratified"
            )
        )
        means, variances, index = [], [], 0
        while (batch := eval_batch(size, index)) is not None and (not rows or len(means) < rows):
            keys_B = jax.random.split(jax.random.fold_in(jax.random.key(SEED), index), size)
            nats_NB = np.asarray(compute(params, batch, keys_B), np.float64)
            real_B = (np.asarray(batch["labels"]) != IGNORE).any(axis=1)
            means += nats_NB.mean(axis=0)[real_B].tolist()
            variances += nats_NB.var(axis=0, ddof=min(1, draws - 1))[real_B].tolist()
            index += 1
        nats_R = np.asarray(means[: rows or None]) / length
        over_draws = math.sqrt(np.mean(variances[: rows or None]) / draws / len(nats_R)) / length
        found[name] = {
            "loss": which.name + (" (stratified)" if name == "stratified" else ""),
            "nats_per_token": float(nats_R.mean()),
            "perplexity": float(np.exp(nats_R.mean())),
            "bits_per_token": float(nats_R.mean() / math.log(2)),
            "standard_error_draws_at_most": over_draws,
            "standard_error_rows": None,
        }
        if len(nats_R) > 1:
            error = nats_R.std(ddof=1) / len(nats_R) ** 0.5
            found[name]["standard_error_rows"] = float(error)
        found[name] |= {"draws": draws, "rows": len(nats_R), "tokens_per_row": length}
    return _write(found, folder / "likelihood.json")


def generative_perplexity(
    sample: Callable[..., np.ndarray],
    tokenizer: Any,
    scorer: str,
    params: Any,
    extra: Any,
    folder: pathlib.Path,
    rows: int,
    length: int,
) -> str:
    """Samples scored by a causal language model, in both conventions that papers use.

    tokens: the mean over samples of exp(nats per token), of the sampled tokens themselves, the
    first not scored (Ou et al. 2025); only for a scorer of the same tokenizer. text: exp of the
    mean over all tokens of the samples as text, tokenised anew, before a sample's first end of
    document, in one row however long (after Sahoo et al. 2024). Beside it the unigram entropy of a
    sample in nats, since samples that repeat themselves score well.
    """
    from .run import load  # which builds tasks

    del length
    if not scorer:
        raise ConfigError("this needs --sampler scorer=DIR, a run of a causal language model")
    run = load(scorer)
    if run.config.task != "language_model" or run.config.data["layout"] == "streams":
        raise ConfigError(
            f"sampler.scorer={scorer} must be a language_model whose data.layout is not streams"
        )
    theirs = Corpus(build_part(TextConfig, run.config.data, "data")).tokenizer
    samples_RT = np.asarray(sample(params, extra, jax.random.key(SEED), rows or 64))

    def row(params, extra, ids_T, count):
        place_T = jnp.arange(ids_T.shape[0] - 1, dtype=jnp.int32)
        labels_T = jnp.where(place_T + 1 < count, ids_T[1:], IGNORE)
        one = {"ids": ids_T[:-1], "labels": labels_T, "positions": place_T}
        one["segments"] = (place_T < count).astype(jnp.int32)
        batch = jax.tree.map(lambda x: x[None], one)
        keys = jax.random.split(jax.random.key(0), 1)  # not used by language models
        return run.task.evaluate(params, extra, batch, keys)["loss"]

    @jax.jit
    def score(params, extra, ids_RT, counts_R):
        each = lambda inputs: row(params, extra, *inputs)
        return jax.lax.map(each, (ids_RT, counts_R), batch_size=AT_ONCE)

    def nats(rows_ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of each row, and its scored tokens."""
        longest = max(2, *map(len, rows_ids))
        ids_RT = np.zeros((len(rows_ids), longest), np.int32)
        for row, ids in zip(ids_RT, rows_ids, strict=True):
            row[: len(ids)] = ids
        counts_R = np.asarray([len(ids) for ids in rows_ids], np.int32)
        sums_R, tokens_R = score(run.params, run.extra, ids_RT, counts_R)
        return np.asarray(sums_R, np.float64), np.asarray(tokens_R, np.float64)

    found: dict[str, Any] = {"scorer": scorer, "samples": len(samples_RT)}
    found["unigram_entropy"] = float(np.mean([_entropy(ids) for ids in samples_RT]))
    if theirs.identity == tokenizer.identity:
        sums_R, tokens_R = nats(list(samples_RT))
        found["perplexity_tokens"] = float(np.exp(sums_R / tokens_R).mean())
    texts = [tokenizer.decode(_until_end(ids, tokenizer)) for ids in samples_RT]
    anew = [np.asarray(theirs.encode(text)) for text in texts]
    sums_R, tokens_R = nats(anew)
    found["perplexity_text"] = float(np.exp(sums_R.sum() / max(tokens_R.sum(), 1)))
    return _write(found, folder / "generative_perplexity.json")


def _until_end(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """The tokens before the first end of document."""
    ends = np.flatnonzero(ids == tokenizer.end) if tokenizer.end is not None else []
    return ids[: ends[0]] if len(ends) else ids


def _entropy(ids: np.ndarray) -> float:
    """-sum f log f of the tokens' frequencies."""
    _, counts = np.unique(ids, return_counts=True)
    f = counts / counts.sum()
    return float(-(f * np.log(f)).sum())


def _write(found: dict[str, Any], path: pathlib.Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2)
    path.write_text(text + "\n")
    return text
