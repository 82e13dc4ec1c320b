"""The 3 x 3 convolution of images.

xla.py         as the compiler has it: the definition
native_cpu.py  for CPUs in C++, native_cpu.cc
api.py         the public function and the table of implementations
"""

from .api import convolution_3x3

__all__ = ["convolution_3x3"]
