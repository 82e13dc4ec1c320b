"""RADD: masked (absorbing) diffusion over tokens, without time in the network (Ou et al. 2025).

config.py, model.py, interop.py   the network, and published checkpoints
schedules.py, times.py            how much is masked at a time; the times of a batch
losses.py, entropies.py           five losses of one mean, and the cross entropies in them
exact.py                          the same by enumeration, for small models
"""

from . import entropies, exact, losses, schedules, times
from .config import SIZES, RADDConfig
from .entropies import ar_nats, cross_entropy, score_entropy
from .losses import LOSSES, Corruption, Loss, Noise, value
from .model import RADD
from .schedules import Schedule, schedule

__all__ = [
    "LOSSES",
    "RADD",
    "SIZES",
    "Corruption",
    "Loss",
    "Noise",
    "RADDConfig",
    "Schedule",
    "ar_nats",
    "cross_entropy",
    "entropies",
    "exact",
    "losses",
    "schedule",
    "schedules",
    "score_entropy",
    "times",
    "value",
]
