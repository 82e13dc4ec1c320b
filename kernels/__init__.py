"""Scan kernels: one public function per operation, several implementations behind it.

Start with ``delta_product/reference.py``: it is the definition that every other
implementation is tested against.
"""

from .delta_product import delta_product, delta_product_step

__all__ = ["delta_product", "delta_product_step"]
