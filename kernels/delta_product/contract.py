"""The DeltaProduct scan for ``backends.py``.

q [B, T, H, K]; k [B, T, N, H, K]; v [B, T, N, H, V]; beta [B, T, N, H]
g [B, T, H] log decay, or None
the state [B, H, K, V]
"""

from ..backends import Contract
from ..rows import power_of_two

CHECKPOINT = 128  # micro-steps between two states that are kept, at most


def _longest(q, k, *others) -> int:
    return power_of_two(max(1, CHECKPOINT // k.shape[2]) + 1) // 2


CONTRACT = Contract(("BTHK", "BTNHK", "BTNHV", "BTNH", "BTH"), "BHKV", _longest)
