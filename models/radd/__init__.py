"""Masked diffusion over tokens without time in the network (RADD; Ou et al. 2025)."""

from . import entropies, exact, losses, times
from .entropies import ar_nats, cross_entropy, score_entropy
from .losses import LOSSES, Corruption, Loss, Noise, value
from .schedule import Schedule, schedule

__all__ = [
    "LOSSES",
    "Corruption",
    "Loss",
    "Noise",
    "Schedule",
    "ar_nats",
    "cross_entropy",
    "entropies",
    "exact",
    "losses",
    "schedule",
    "score_entropy",
    "times",
    "value",
]
