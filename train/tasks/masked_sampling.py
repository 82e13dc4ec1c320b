"""Texts from a masked diffusion: from nothing, behind a prompt, or in the gaps of a text.

Dimensions: R rows, T tokens of the context.
"""

from collections.abc import Callable, Sequence
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import radd
from ...models.generation import Generated, Sampling
from ..config import ConfigError
from ..data.pipeline import DataError
from .masked_config import MaskedSamplerConfig

GAP = re.compile(r"\[\[(\d+)\]\]")


class MaskedSampler:
    """Fills masks with a network.

    Args:
      config: how.
      schedule: of the diffusion.
      network: params -> ``radd.Network``.
      length: T.
      encode: text -> tokens.
      mask: the mask's token.
    """

    def __init__(
        self,
        config: MaskedSamplerConfig,
        schedule: radd.Schedule,
        network: Callable[[Any], radd.Network],
        length: int,
        encode: Callable[[str], np.ndarray],
        mask: int,
    ):
        self.config, self.network, self.length = config, network, length
        self.encode, self.mask = encode, mask
        self.schedule = schedule
        self._filled = jax.jit(self._fill, static_argnums=0)

    def fill(
        self, params: Any, keys_R, start_RT: np.ndarray, lengths_R: Sequence[int] | None = None
    ) -> np.ndarray:
        """Samples what is masked in rows [R, T] of the context's length; all else stays.

        Masks from a row's length on are not wanted, and may stay.
        """
        return np.asarray(self._filled(*self._inputs(params, keys_R, start_RT, lengths_R)).tokens)

    def _inputs(self, params, keys_R, start_RT, lengths_R, sampling: Sampling | None = None):
        lengths_R = [self.length] * len(start_RT) if lengths_R is None else lengths_R
        sampling = sampling or self.config.sampling
        return sampling, params, keys_R, jnp.asarray(start_RT), jnp.asarray(lengths_R, jnp.int32)

    def _fill(self, sampling: Sampling, params, keys_R, start_RT, lengths_R) -> radd.events.Sampled:
        sample = radd.events.sample
        if self.config.order in radd.adaptive.ORDERS:
            sample = functools.partial(radd.adaptive.sample, order=self.config.order)
            lengths_R = jnp.full_like(lengths_R, self.length)  # it chooses among all masks
        wanted_RT = jnp.arange(self.length, dtype=jnp.int32)[None] < lengths_R[:, None]
        plan = self.plan(keys_R, (start_RT == self.mask) & wanted_RT)
        return sample(self.network(params), keys_R, start_RT, plan, sampling, self.config.slots)

    def plan(self, keys_R, free_RT: jax.Array) -> radd.plans.Plan:
        """Which positions of a row are unmasked together."""
        if self.config.order == "first_hitting":
            return radd.plans.first_hitting_plan(keys_R, free_RT)[0]
        if self.config.order in radd.plans.ORDERS:
            return radd.plans.order_plan(self.config.order, free_RT, keys_R)
        return radd.plans.diffusion_plan(keys_R, free_RT, self._cdf_N)

    @functools.cached_property
    def _cdf_N(self) -> np.ndarray:
        c = self.config
        psi_N = radd.rates.unmask_rates(self.schedule, c.steps, c.method, c.grid)
        return radd.rates.step_probabilities(psi_N)[1]

    def complete(
        self,
        params: Any,
        extra: Any,
        key: jax.Array,
        prompts: Sequence[str],
        *,
        sampling: Sampling | None = None,
        max_tokens: int,
        stops: Sequence[str] = (),
        stop_at_end: bool = True,
        end: int | None = None,
    ) -> Generated:
        """Texts behind prompts, which stay; beyond the context, block by block.

        ``sampling`` is the config's unless it is given.

        Raises:
          ConfigError: for a sampling or an order that does not go with this.
          DataError: for a prompt that leaves no room in the context.
        """
        del extra
        rows = [self.encode(text) for text in prompts]
        for i, ids in enumerate(rows):
            if len(ids) >= self.length:
                raise DataError(
                    f"prompt {i} has {len(ids)} tokens and leaves no room in the context of"
                    f" {self.length}: shorten it"
                )
        sampling = sampling or self.config.sampling
        try:
            radd.draws.check_sampling(sampling)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
        start_RT = np.full((len(rows), self.length), self.mask, np.int32)
        for row, ids in zip(start_RT, rows, strict=True):
            row[: len(ids)] = ids
        beyond = max(len(ids) for ids in rows) + max_tokens - self.length
        keys_R = radd.draws.row_keys(key, len(rows))
        lengths_R = [len(ids) + max_tokens for ids in rows]
        static, *inputs = self._inputs(params, keys_R, start_RT, lengths_R, sampling)
        if beyond > 0:
            inputs = inputs[:-1]
            compiled = jax.jit(self._extend(sampling, beyond)).lower(*inputs).compile()
        else:
            compiled = self._filled.lower(static, *inputs).compile()
        begin = time.perf_counter()
        found_RT = np.asarray(compiled(*inputs).tokens)
        seconds = time.perf_counter() - begin
        new = [
            row[len(ids) : len(ids) + max_tokens] for ids, row in zip(rows, found_RT, strict=True)
        ]
        ends = [self.encode(text) for text in stops]
        if stop_at_end and end is not None:
            ends.append(np.asarray([end]))
        cut = [min((_find(ids, stop) for stop in ends), default=len(ids)) for ids in new]
        return Generated(
            tokens=[ids[:length] for ids, length in zip(new, cut, strict=True)],
            stopped=[length < len(ids) for ids, length in zip(new, cut, strict=True)],
            prompt_tokens=sum(map(len, rows)),
            new_tokens=sum(map(len, new)),
            prefill_seconds=0.0,
            decode_seconds=seconds,
        )

    def _extend(self, sampling: Sampling, beyond: int) -> Callable[..., radd.events.Sampled]:
        c = self.config
        if c.order in radd.adaptive.ORDERS:
            raise ConfigError(f"sampler.order={c.order} does not go beyond the context")
        if c.block >= self.length:
            raise ConfigError(
                f"sampler.block ({c.block}) must be below the context ({self.length}), so that a"
                " window sees something of the one before"
            )
        options = {"block": c.block, "blocks": -(-beyond // c.block)}

        def run(params, keys_R, start_RT):
            inputs = self.network(params), keys_R, start_RT, self.plan, sampling, c.slots
            return radd.blocks.extend(*inputs, **options)

        return run

    def infill(
        self, params: Any, extra: Any, key: jax.Array, texts: Sequence[str]
    ) -> tuple[np.ndarray, list[int]]:
        """Fills the gaps of texts: "[[N]]" stands for N tokens.

        Returns:
          Tokens [R, T] and how many of each row are the text.

        Raises:
          DataError: for a text without a gap, or beyond the context.
        """
        del extra
        start_RT = np.full((len(texts), self.length), self.mask, np.int32)
        lengths = []
        for i, text in enumerate(texts):
            parts = GAP.split(text)
            if len(parts) == 1:
                raise DataError(f"text {i} has no gap: write [[12]] for one of 12 tokens")
            known = [self.encode(part) for part in parts[::2]]
            gaps = [int(part) for part in parts[1::2]]
            length = sum(map(len, known)) + sum(gaps)
            if length > self.length:
                raise DataError(
                    f"text {i} has {length} tokens with its gaps, the context is {self.length}"
                )
            place = 0
            for ids, gap in zip(known, [*gaps, 0], strict=True):
                start_RT[i, place : place + len(ids)] = ids
                place += len(ids) + gap
            lengths.append(length)
        keys_R = radd.draws.row_keys(key, len(texts))
        return self.fill(params, keys_R, start_RT, lengths), lengths


def _find(ids: np.ndarray, part: np.ndarray) -> int:
    """Where ``part`` begins in ``ids``; their length if nowhere."""
    if len(part) > len(ids):
        return len(ids)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(part))
    found = np.flatnonzero((windows == part).all(axis=1))
    return int(found[0]) if len(found) else len(ids)
