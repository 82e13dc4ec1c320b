"""The additive linear recurrence: values averaged by a softmax over time, per key channel.

reference.py  the definition, one token after another
chunk.py      the mathematics of one chunk, forward and backward
xla.py        a scan over chunks with that backward, in plain JAX
attention.py  the non-causal form, which needs no scan
api.py        the public functions
"""

from .api import additive_attention, additive_scan, additive_step

__all__ = ["additive_attention", "additive_scan", "additive_step"]
