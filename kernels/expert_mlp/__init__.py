"""Mixture of experts: every token through the few experts that a router chose for it.

layout.py           which row of a buffer holds which token: blocks, fixed capacity, sorted rows
implementations.py  the experts on such rows
api.py              the public function, argument checks
parallel.py         the same on a mesh that divides the tokens, and perhaps the experts
"""

from .api import Experts, capacity, expert_mlp, kept
from .parallel import expert_mlp_sharded

__all__ = ["Experts", "capacity", "expert_mlp", "expert_mlp_sharded", "kept"]
