"""The ``objective`` and ``sampler`` of masked diffusion."""

import dataclasses

from ...models import radd
from ...models.generation import Sampling

ORDERS = ("diffusion", *radd.plans.ORDERS, "first_hitting", *radd.adaptive.ORDERS)


@dataclasses.dataclass(frozen=True)
class MaskedObjectiveConfig:
    """What is minimised, and how a model is evaluated.

    Attributes:
      loss: a name of ``scanax.models.radd.losses``.
      schedule: how much is masked at a time, for losses over time and for the sampler; see
        ``scanax.models.radd.schedules``.
      times: how a batch's times are drawn, see ``scanax.models.radd.times``; "" for the loss's
        published way.
      eval_draws: sets of masks for every row of an evaluation, of stratified sizes.
    """

    loss: str
    schedule: str
    times: str
    eval_draws: int

    def __post_init__(self):
        if self.loss not in radd.LOSSES:
            raise ValueError(
                f"objective.loss must be one of {', '.join(radd.LOSSES)}; got {self.loss!r}"
            )
        try:
            radd.schedule(self.schedule)
            radd.times.check(self.draw)
        except ValueError as error:
            raise ValueError(f"objective: {error}") from error
        if self.eval_draws < 1:
            raise ValueError(f"objective.eval_draws must be at least 1, got {self.eval_draws}")

    @property
    def function(self) -> radd.Loss:
        return radd.Loss(self.loss, radd.schedule(self.schedule))

    @property
    def draw(self) -> str:
        """The name of how times are drawn."""
        return self.times or radd.Loss(self.loss).times


@dataclasses.dataclass(frozen=True)
class MaskedSamplerConfig:
    """How samples are drawn.

    Attributes:
      order: "diffusion", positions that a sampler of ``steps`` steps would unmask together;
        "forward", "backward", "random" or "first_hitting", one after the other; "confidence" or
        "entropy", as many together as with "diffusion", the surest first.
      steps: of the diffusion.
      method: of its steps, "tweedie" or "euler".
      grid: of its times, see ``scanax.models.radd.rates``.
      temperature, top_k, top_p, min_p: see ``scanax.models.generation.Sampling``.
      slots: rows that are computed at once; further ones wait for a free place.
      block: new tokens of every window of a text beyond the context.
      likelihood_draws: of the analysis "likelihood", for every row.
      scorer: folder of a causal language model's run, for the analysis "generative_perplexity".
    """

    order: str
    steps: int
    method: str
    grid: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    slots: int
    block: int
    likelihood_draws: int
    scorer: str

    def __post_init__(self):
        choices = {"order": ORDERS, "method": radd.rates.METHODS, "grid": radd.rates.GRIDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"sampler.{name} must be one of {', '.join(allowed)};"
                    f" got {getattr(self, name)!r}"
                )
        for name in ("steps", "slots", "block", "likelihood_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler.{name} must be at least 1, got {getattr(self, name)}")
        try:
            _ = self.sampling
        except ValueError as error:
            raise ValueError(f"sampler.{error}") from error

    @property
    def sampling(self) -> Sampling:
        """How a token is drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)
