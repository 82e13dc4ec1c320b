"""RADD: absorbing discrete diffusion whose network predicts clean tokens and needs no time."""

from .config import SIZES, RADDConfig
from .model import RADD

__all__ = ["RADD", "SIZES", "RADDConfig"]
