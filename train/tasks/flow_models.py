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
      shape: [H, W, C] of the images that it is for; None if it takes data of any.
    """

    config: Any
    module: nn.Module
    num_classes: int
    shape: tuple[int, ...] | None


IMAGES: Mapping[str, tuple[type, type[nn.Module]]] = {
    "ncsnpp": (NCSNppConfig, NCSNpp),
    "edm_songunet": (SongUNetConfig, EDMUNet),
    "edm_dhariwal": (DhariwalUNetConfig, EDMUNet),
    "dit": (DiTConfig, DiT),
    "lightnet": (LightNetDiTConfig, LightNetDiT),
}
POINTS: Mapping[str, tuple[type, type[nn.Module]]] = {"mlp": (VelocityMLPConfig, VelocityMLP)}


def flow_model(config: Config) -> FlowModel:
    """The model of a config.

    Raises:
      ConfigError, ValueError: if the task has no such family, or the model is none for flows.
    """
    kind, module = choose(config, IMAGES if config.task == "rectified_flow" else POINTS)
    model = build(kind, config.model, "model")
    if getattr(model, "learn_sigma", False):
        raise ValueError("model.learn_sigma is not for flows: a velocity has no variance")
    size = getattr(model, "image_size", 0)
    shape = (size, size, model.channels) if size else None
    return FlowModel(model, module(model), getattr(model, "num_classes", 0), shape)
