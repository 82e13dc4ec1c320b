"""The U-Nets of rectified flow, 2-RF++ and SlimFlow: NCSN++ and DDPM++, EDM's SongUNet, and ADM.

config.py        names, meaning and validity of their configurations
presets.py       the published ones
ncsnpp.py        NCSN++ and DDPM++
edm.py           SongUNet and ADM as in EDM's code, with what edm_embedding.py tells the blocks
blocks.py        residual block and attention of all of them
layers.py        convolution, group norm
embedding.py     features of a noise label
resample.py      halving and doubling images
interop.py       published checkpoints
bench.py         training and sampling beside the same network in PyTorch (bench_torch.py)
"""

from .config import DhariwalUNetConfig, NCSNppConfig, SongUNetConfig, UNetConfig
from .edm import EDMUNet
from .ncsnpp import NCSNpp
from .presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "DhariwalUNetConfig",
    "EDMUNet",
    "NCSNpp",
    "NCSNppConfig",
    "SongUNetConfig",
    "UNetConfig",
    "preset",
]
