"""Masked diffusion over tokens without time in the network (RADD; Ou et al. 2025)."""

from . import exact, losses, times
from .losses import (
    LOSSES,
    Corruption,
    Loss,
    Noise,
    ar_nats,
    cross_entropy,
    score_entropy,
    value,
)
from .schedule import Schedule, schedule

__all__ = [
    "LOSSES",
    "Corruption",
    "Loss",
    "Noise",
    "Schedule",
    "ar_nats",
    "cross_entropy",
    "exact",
    "losses",
    "schedule",
    "score_entropy",
    "times",
    "value",
]
