"""Scan kernels: one public function per operation, several implementations behind it.

Start with ``delta_product/reference.py``: it is the definition that every other
implementation is tested against.
"""

from .additive_scan import additive_attention, additive_scan, additive_step
from .convolution import convolution_3x3
from .delta_product import delta_product, delta_product_step
from .expert_mlp import Experts, expert_mlp, expert_mlp_sharded
from .short_convolution import short_convolution

__all__ = [
    "Experts",
    "additive_attention",
    "additive_scan",
    "additive_step",
    "convolution_3x3",
    "delta_product",
    "delta_product_step",
    "expert_mlp",
    "expert_mlp_sharded",
    "short_convolution",
]
