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

    def fill(self, params: Any, keys_R, start_RT: np.ndarray) -> np.ndarray:
        """Samples what is masked in rows [R, T] of the context's length; all else stays."""
        run = functools.partial(self._fill, self.config.sampling)
        return np.asarray(jax.jit(run)(params, keys_R, jnp.asarray(start_RT)).tokens)

    def _fill(self, sampling: Sampling, params, keys_R, start_RT) -> radd.events.Sampled:
        sample = radd.events.sample
        if self.config.order in radd.adaptive.ORDERS:
            sample = functools.partial(radd.adaptive.sample, order=self.config.order)
        plan = self.plan(keys_R, start_RT == self.mask)
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
        sampling: Sampling,
        max_tokens: int,
        stops: Sequence[str] = (),
        stop_at_end: bool = True,
        end: int | None = None,
    ) -> Generated:
        """Texts behind prompts, which stay; beyond the context, block by block.

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
        try:
            radd.draws.check_sampling(sampling)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
        start_RT = np.full((len(rows), self.length), self.mask, np.int32)
        for row, ids in zip(start_RT, rows, strict=True):
            row[: len(ids)] = ids
        beyond = max(len(ids) for ids in rows) + max_tokens - self.length
        run = functools.partial(self._fill, sampling)
        if beyond > 0:
            run = self._extend(sampling, beyond)
        inputs = params, radd.draws.row_keys(key, len(rows)), jnp.asarray(start_RT)
        compiled = jax.jit(run).lower(*inputs).compile()
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
          DataError: for a text beyond the context.
        """
        del extra
        start_RT = np.full((len(texts), self.length), self.mask, np.int32)
        lengths = []
        for i, text in enumerate(texts):
            parts = [
                np.full(int(part), self.mask, np.int32) if odd % 2 else self.encode(part)
                for odd, part in enumerate(GAP.split(text))
            ]
            ids = np.concatenate(parts)
            if len(ids) > self.length:
                raise DataError(
                    f"text {i} has {len(ids)} tokens with its gaps, the context is {self.length}"
                )
            start_RT[i, : len(ids)] = ids
            lengths.append(len(ids))
        keys_R = radd.draws.row_keys(key, len(texts))
        return self.fill(params, keys_R, start_RT), lengths


def _find(ids: np.ndarray, part: np.ndarray) -> int:
    """Where ``part`` begins in ``ids``; their length if nowhere."""
    if len(part) > len(ids):
        return len(ids)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(part))
    found = np.flatnonzero((windows == part).all(axis=1))
    return int(found[0]) if len(found) else len(ids)
