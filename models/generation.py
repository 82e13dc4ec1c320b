"""Generation from causal language models that carry a cache: prefill in pieces, decode in a loop.

Dimensions: B rows, T tokens of a piece, S vocabulary.

A model is ``apply(params, ids [B, T], mask [B, T] or None, cache) -> (logits [B, 1, S] of the last
position, cache)``. Rows are independent: what a row draws depends on its prompt, the seed and
its number, not on the rows beside it.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PIECE = 512  # longest piece of a prompt that is computed at once
Apply = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, in this order; the defaults leave logits as they are.

    Attributes:
      repetition_penalty: divides positive logits of tokens that the row has already, and
        multiplies negative ones (Keskar et al. 2019); above 1 discourages them.
      temperature: divides logits; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; 0 for all.
      top_p: only the likeliest tokens that together have this probability (Holtzman et al.
        2020); always at least one.
      min_p: only tokens at least this fraction as likely as the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        limits = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "positive"),
        }
        for name, (valid, what) in limits.items():
            if not valid:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Generated:
    """What :func:`generate` returns.

    Attributes:
      tokens: per row the new tokens, int32, without the stop sequence.
      stopped: per row whether a stop sequence ended it; else it has ``max_tokens``.
      prompt_tokens, new_tokens: counts over all rows; new ones include stop sequences.
      prefill_seconds, decode_seconds: without compilation.
    """

    tokens: list[np.ndarray]
    stopped: list[bool]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float


def generate(
    apply: Apply,
    params: Any,
    empty_cache: Callable[[int, int], Any],
    prompts: Sequence[np.ndarray],
    key: jax.Array,
    *,
    vocab_size: int,
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[Sequence[int]] = (),
) -> Generated:
    """Continues prompts of any lengths until a stop sequence or ``max_tokens``.

    Prompts are padded on the left to a common length and read in pieces of at most ``PIECE``
    tokens, so memory does not grow with their length. All new tokens come out of one compiled
    loop, which ends when every row has stopped.

    Args:
      apply: the model, see the module.
      params: its parameters.
      empty_cache: (batch size, tokens that it must have room for, padding included) -> cache
        before the first token.
      prompts: per row at least one token, ids in [0, vocab_size).
      key: row i draws from ``fold_in(key, i)``.
      vocab_size: tokens from here on are never drawn (padding of the vocabulary).
      max_tokens: new tokens per row, at most.
      sampling: how they are drawn.
      stops: token sequences after which a row ends.

    Raises:
      ValueError: for an empty prompt, a token outside the vocabulary, or an empty stop.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(f"prompt {i} has tokens outside [0, {vocab_size})")
    if not all(map(len, stops)):
        raise ValueError("a stop sequence is empty")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    batch, longest = len(prompts), max(map(len, prompts))
    piece = min(PIECE, 1 << (longest - 1).bit_length())  # few shapes to compile
    total = piece * -(-longest // piece)
    ids_BT, mask_BT = np.zeros((batch, total), np.int32), np.zeros((batch, total), bool)
    for row, prompt in enumerate(prompts):
        ids_BT[row, total - len(prompt) :] = prompt
        mask_BT[row, total - len(prompt) :] = True
    seen_BS = None
    if sampling.repetition_penalty != 1:
        seen_BS = np.zeros((batch, vocab_size), bool)
        np.put_along_axis(seen_BS, np.where(mask_BT, ids_BT, ids_BT[:, -1:]), True, axis=1)

    cache = empty_cache(batch, total + max_tokens)
    first = (params, ids_BT[:, :piece], mask_BT[:, :piece], cache)
    prefill = jax.jit(apply, donate_argnums=3).lower(*first).compile()
    start, logits_B1S = time.perf_counter(), None
    for i in range(0, total, piece):
        part = slice(i, i + piece)
        logits_B1S, cache = prefill(params, ids_BT[:, part], mask_BT[:, part], cache)
    assert logits_B1S is not None
    logits_BS = jax.block_until_ready(logits_B1S)[:, 0, :vocab_size]
    prefill_seconds = time.perf_counter() - start

    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    loop = functools.partial(_decode, apply, max_tokens, sampling, tuple(map(tuple, stops)))
    inputs = (params, logits_BS, cache, keys_B, seen_BS)
    compiled = jax.jit(loop).lower(*inputs).compile()
    start = time.perf_counter()
    tokens_BT, counts_B, stop_B = jax.device_get(compiled(*inputs))
    decode_seconds = time.perf_counter() - start
    return Generated(
        tokens=[row[: n - s] for row, n, s in zip(tokens_BT, counts_B, stop_B, strict=True)],
        stopped=[bool(s) for s in stop_B],
        prompt_tokens=int(mask_BT.sum()),
        new_tokens=int(counts_B.sum()),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
    )


def draw(keys_B, logits_BS: jax.Array, seen_BS, sampling: Sampling) -> jax.Array:
    """One token per row [B] int32.

    Args:
      keys_B: a key per row.
      logits_BS: [B, S].
      seen_BS: [B, S] bool, tokens that the row has; None without a repetition penalty.
      sampling: static.
    """
    s = sampling
    if seen_BS is not None:
        scaled_BS = jnp.where(
            logits_BS > 0, logits_BS / s.repetition_penalty, logits_BS * s.repetition_penalty
        )
        logits_BS = jnp.where(seen_BS, scaled_BS, logits_BS)
    if s.temperature == 0:
        return jnp.argmax(logits_BS, axis=-1).astype(jnp.int32)
    logits_BS = filter_logits(logits_BS, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BS).astype(jnp.int32)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., S] divided by the temperature, and the lowest number for tokens left out.

    Args:
      logits: [..., S].
      sampling: static; temperature (above 0), top_k, top_p and min_p, in this order.
    """
    s = sampling
    logits = logits / s.temperature
    lowest = jnp.finfo(logits.dtype).min
    if 0 < s.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, s.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, lowest, logits)
    if s.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # probability of the likelier tokens
        kept = before < s.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, lowest, logits)
    if s.min_p > 0:
        limit = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(s.min_p)
        logits = jnp.where(logits < limit, lowest, logits)
    return logits


def _decode(
    apply: Apply,
    max_tokens: int,
    sampling: Sampling,
    stops: tuple[tuple[int, ...], ...],
    *inputs: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [B, max_tokens], how many there are [B], and the length of the stop at the end [B]."""
    params, logits_BS, cache, keys_B, seen_BS = inputs
    batch, vocab_size = logits_BS.shape
    width = max([1, *map(len, stops)])

    def unfinished(carry):
        step, *_, end_B, _ = carry
        return (step < max_tokens) & jnp.any(end_B < 0)

    def body(carry):
        step, logits_BS, cache, seen_BS, tokens_BT, recent_BW, end_B, stop_B = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        drawn_B = draw(keys, logits_BS, seen_BS, sampling)
        tokens_BT = tokens_BT.at[:, step].set(drawn_B)
        recent_BW = jnp.concatenate([recent_BW[:, 1:], drawn_B[:, None]], axis=1)
        if seen_BS is not None:
            seen_BS = seen_BS.at[jnp.arange(batch), drawn_B].set(True)
        for stop in stops:
            hit_B = jnp.all(recent_BW[:, width - len(stop) :] == jnp.asarray(stop)[None], axis=1)
            hit_B &= end_B < 0
            stop_B = jnp.where(hit_B, jnp.maximum(stop_B, len(stop)), stop_B)
        end_B = jnp.where((stop_B > 0) & (end_B < 0), step + 1, end_B)
        logits_B1S, cache = apply(params, drawn_B[:, None], None, cache)
        logits_BS = logits_B1S[:, 0, :vocab_size]
        return step + 1, logits_BS, cache, seen_BS, tokens_BT, recent_BW, end_B, stop_B

    carry = (
        jnp.asarray(0, jnp.int32),
        logits_BS,
        cache,
        seen_BS,
        jnp.zeros((batch, max_tokens), jnp.int32),
        jnp.full((batch, width), -1, jnp.int32),
        jnp.full(batch, -1, jnp.int32),  # tokens up to the end of the stop sequence
        jnp.zeros(batch, jnp.int32),  # its length
    )
    step, *_, tokens_BT, _, end_B, stop_B = jax.lax.while_loop(unfinished, body, carry)
    return tokens_BT, jnp.where(end_B < 0, step, end_B), stop_B
