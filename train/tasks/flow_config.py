"""What is asked of a flow, and how samples are drawn from it: the config's groups."""

import dataclasses

import jax.numpy as jnp

from ...models.rectified_flow import losses, recipe, time_density
from ...models.rectified_flow.annealing import schedule as annealing

FLIPS = ("none", "example", "batch")
RESIZED = {"": None, "64": True, "224": False}  # to this size: whether corners are aligned

_LAST = 1 - 2.0**-23  # of the uniform numbers that times are made of


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is asked of the velocity.

    Attributes:
      loss: a name of ``scanax.models.rectified_flow.losses``.
      times: density of the training times, see ``times.time_density``.
      eps: its cut-off; 0 for the density's own.
      weight: over time, a name of ``losses.WEIGHTS``.
      huber_c: "d", "sqrt_d" or a number, see ``losses.per_example``.
      distance: perceptual, for losses with "lpips": "random_conv", or "lpips:FILE", "piq:FILE"
        with weights that the user has, read when the loss is first computed; "" for none.
      distance_size: images are resized to this for it: "" as they are, "64" as SlimFlow does,
        corners aligned, or "224" as 2-RF++ does.
      annealing: share of fresh noise in the pairs' (``annealing.schedule``): "linear:300000";
        "none".
      flip: pairs are mirrored as one: "none", "example" or "batch", one coin for the batch.
      teacher: folder of a trained flow, for the two keys below; its averaged parameters are used.
        A run goes on only with the parameters that it began with.
      online_steps: the data's X_1 are replaced by the teacher's, in so many Euler steps from X_0:
        reflow without stored pairs; 0 for none. Evaluation is of the data's own X_1.
      guidance: weight of the two-step term of flow-guided distillation; 0 for none.

    Annealing and guidance draw fresh noise: X_0 must be N(0, I).
    """

    loss: str
    times: str
    eps: float
    weight: str
    huber_c: str
    distance: str
    distance_size: str
    annealing: str
    flip: str
    teacher: str
    online_steps: int
    guidance: float

    def __post_init__(self):
        density = time_density(self.times, self.eps or None)
        losses.weight(self.weight, jnp.zeros(1))
        if self.annealing != "none":
            annealing(self.annealing)
        if self.flip not in FLIPS:
            raise ValueError(f"objective.flip must be one of {', '.join(FLIPS)}; got {self.flip!r}")
        if self.distance_size not in RESIZED:
            raise ValueError(
                f"objective.distance_size must be one of {', '.join(map(repr, RESIZED))}"
            )
        if min(self.online_steps, self.guidance, self.eps) < 0:
            raise ValueError("objective.online_steps, guidance and eps must not be negative")
        if bool(self.online_steps or self.guidance) != bool(self.teacher):
            raise ValueError(
                "objective.teacher is the flow that objective.online_steps or objective.guidance"
                " use: set it with one of them"
            )
        if losses.is_perceptual(self.loss) != bool(self.distance):
            raise ValueError(
                f"objective.loss={self.loss} with objective.distance={self.distance!r}: a loss with"
                " lpips in its name needs a distance, the others none"
            )
        losses.check(self.loss, lambda x, y: x, self.c)
        kind, _, file = self.distance.partition(":")
        if self.distance not in ("", "random_conv") and not (kind in ("lpips", "piq") and file):
            raise ValueError(
                f"objective.distance={self.distance!r} should be random_conv, lpips:FILE or"
                " piq:FILE"
            )
        latest = float(density.from_uniform(jnp.asarray([0.0, _LAST], jnp.float32)).max())
        if self.loss.endswith("divt") and latest >= 1:
            raise ValueError(
                f"objective.loss={self.loss} divides by 1 - t, and objective.times={self.times}"
                " go up to t = 1"
            )

    @property
    def c(self) -> float | str:
        """Of the pseudo-Huber loss."""
        try:
            return float(self.huber_c)
        except ValueError:
            return self.huber_c


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn.

    Attributes:
      recipe: of the solver, see ``scanax.models.rectified_flow.recipes``.
      label: class of all samples; -1 for all classes in turn.
      invert: of the way back to noise, for the analyses that need it.
      features: by what the analysis "quality" compares images, see
        ``scanax.train.metrics.make_extractor``; "classifier" trains a small one on the data first.
      recipes: what the analysis "quality" compares.
    """

    recipe: str
    label: int
    invert: str
    features: str
    recipes: tuple[str, ...]

    def __post_init__(self):
        for text in (self.recipe, *self.recipes):
            if not recipe(text).to_data:
                raise ValueError(f"sampler: recipe {text!r} goes to noise, samples go to data")
        if recipe(self.invert).to_data:
            raise ValueError(f"sampler.invert: recipe {self.invert!r} goes to data")
