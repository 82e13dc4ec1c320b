"""The velocities that a rectified flow can be: one entry per family, built from the config."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from ...models.dit import DiT, DiTConfig
from ...models.lightnet import LightNetDiT, LightNetDiTConfig
from ...models.rectified_flow.mlp import VelocityMLP, VelocityMLPConfig
from ...models.unet import DhariwalUNetConfig, EDMUNet, NCSNpp, NCSNppConfig, SongUNetConfig
from ..config import Config, build
from .models import choose


class FlowModel(NamedTuple):
    """A velocity.

    Attributes:
      config: of the model.
      module: (x [B, ...], t [B], label [B] or None, keys=[B] or None) -> velocities [B, ...].
      num_classes: of its condition; 0 for none. One more label stands for "no class".
    """

    config: Any
    module: nn.Module
    num_classes: int


IMAGES: Mapping[str, tuple[type, type[nn.Module]]] = {
    "ncsnpp": (NCSNppConfig, NCSNpp),
    "edm_songunet": (SongUNetConfig, EDMUNet),
    "edm_dhariwal": (DhariwalUNetConfig, EDMUNet),
    "dit": (DiTConfig, DiT),
    "lightnet": (LightNetDiTConfig, LightNetDiT),
}
POINTS: Mapping[str, tuple[type, type[nn.Module]]] = {"mlp": (VelocityMLPConfig, VelocityMLP)}


def flow_model(config: Config, shape: tuple[int, ...]) -> FlowModel:
    """The model of a config, for data of this shape.

    Raises:
      ConfigError: if there is no such family, or the model is not one for this data.
    """
    kind, module = choose(config, IMAGES if len(shape) == 3 else POINTS)
    model = build(kind, config.model, "model")
    size, channels = getattr(model, "image_size", shape[0]), getattr(model, "channels", shape[-1])
    if len(shape) == 3 and (size, size, channels) != shape:
        raise ValueError(
            f"the model is for images of {size} x {size} x {channels}, the data has"
            f" {' x '.join(map(str, shape))}: set model.image_size, model.channels or"
            " data.image_size, data.channels"
        )
    if getattr(model, "learn_sigma", False):
        raise ValueError("model.learn_sigma is not for flows: a velocity has no variance")
    return FlowModel(model, module(model), getattr(model, "num_classes", 0))
