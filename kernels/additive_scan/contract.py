"""The additive scan for ``backends.py``.

q, k, f [B, T, H, K], k logits and f factors on the weights or None; v [B, T, H, V]
the state (S [B, H, K, V], z [B, H, K]), see ``reference.py``
"""

from ..backends import Contract

CHECKPOINT = 64  # tokens between two states that are kept, at most

CONTRACT = Contract(("BTHK", "BTHK", "BTHV", "BTHK"), ("BHKV", "BHK"), lambda *arrays: CHECKPOINT)
