"""LightNet (Qin et al. 2024): additive linear recurrence in one scan over one to three dimensions.

tpe.py             positions on the embedded tokens: a Toeplitz product along every axis of a grid
lrpe.py            positions in every layer: queries and keys turned by their place on the grid
layer.py           the token mixer, causal or over a whole grid
baselines.py       what can stand in its place: softmax, linear and gated linear attention
block.py           mixer and SwiGLU with their norms, conditioned or not; patches
language_model.py  causal and masked language models
classifier.py      images, and other grids, to classes
dit.py             images to images, at a time, for a class: the backbone of flows
interop.py         published checkpoints
bench.py           what a layer costs beside the baselines
"""

from .classifier import LightNetClassifier
from .config import LightNetConfig, LightNetDiTConfig, LightNetGridConfig, LightNetLMConfig
from .dit import LightNetDiT
from .language_model import LightNetLM, LMCache, empty_cache, has_cache, head
from .layer import LayerCache, Mixer

__all__ = [
    "LMCache",
    "LayerCache",
    "LightNetClassifier",
    "LightNetConfig",
    "LightNetDiT",
    "LightNetDiTConfig",
    "LightNetGridConfig",
    "LightNetLM",
    "LightNetLMConfig",
    "Mixer",
    "empty_cache",
    "has_cache",
    "head",
]
