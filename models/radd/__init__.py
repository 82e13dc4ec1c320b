"""RADD: masked (absorbing) diffusion over tokens, without time in the network (Ou et al. 2025).

config.py, model.py, interop.py   the network, and published checkpoints
schedules.py, times.py            how much is masked at a time; the times of a batch
losses.py, entropies.py           five losses of one mean, and the cross entropies in them
exact.py                          the same by enumeration, for small models
network.py, draws.py              what samplers ask of a network; how a token is drawn
rates.py, plans.py                when positions are unmasked, and how many evaluations that takes
events.py                         the sampler: one evaluation for each change of a row
adaptive.py, blocks.py            orders that the network decides; rows beyond the context
steps.py                          the loop over all steps, as published, for comparison
"""

from . import (
    adaptive,
    blocks,
    draws,
    entropies,
    events,
    exact,
    losses,
    plans,
    rates,
    schedules,
    steps,
    times,
)
from .config import SIZES, RADDConfig
from .entropies import ar_nats, cross_entropy, score_entropy
from .losses import LOSSES, Corruption, Loss, Noise, value
from .model import RADD
from .network import Network
from .schedules import Schedule, schedule

__all__ = [
    "LOSSES",
    "RADD",
    "SIZES",
    "Corruption",
    "Loss",
    "Network",
    "Noise",
    "RADDConfig",
    "Schedule",
    "adaptive",
    "ar_nats",
    "blocks",
    "cross_entropy",
    "draws",
    "entropies",
    "events",
    "exact",
    "losses",
    "plans",
    "rates",
    "schedule",
    "schedules",
    "score_entropy",
    "steps",
    "times",
    "value",
]
