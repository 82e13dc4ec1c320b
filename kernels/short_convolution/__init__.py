"""The short causal convolution along time, with its activation.

xla.py         plain JAX: the definition
native_cpu.py  for CPUs in C++, native_cpu.cc
api.py         the public function and the table of implementations
"""

from .api import short_convolution

__all__ = ["short_convolution"]
