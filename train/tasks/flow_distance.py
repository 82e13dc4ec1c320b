"""The perceptual distance that a flow's losses compare images by, from its name."""

import pathlib

from ...models.rectified_flow.losses import Distance
from ...models.rectified_flow.lpips import load_lpips
from ...models.rectified_flow.perceptual import random_conv_distance, resized
from ..config import ConfigError
from .flow_config import RESIZED, ObjectiveConfig


def make_distance(objective: ObjectiveConfig, shape: tuple[int, ...]) -> Distance | None:
    """The perceptual distance of the objective, for images [H, W, C]; None without one.

    Raises:
      ConfigError: if the file that it names holds no weights.
    """
    kind, _, file = objective.distance.partition(":")
    if not kind:
        return None
    if kind == "random_conv":
        scales = max(n for n in (1, 2, 3) if 2 ** (n - 1) <= min(shape[:2]))
        distance = random_conv_distance(channels=shape[2], scales=scales)
    else:
        try:
            distance = load_lpips(pathlib.Path(file), kind)
        except (ValueError, OSError) as error:
            raise ConfigError(f"objective.distance: {error}") from error
    if not objective.distance_size:
        return distance
    size = int(objective.distance_size)
    return resized(distance, size, align_corners=RESIZED[objective.distance_size])
