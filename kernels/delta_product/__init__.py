"""The (gated) DeltaProduct scan: a product of Householder steps per token.

reference.py   the definition, one token after another
chunk.py       the mathematics of one chunk (WY form), forward and backward
xla.py         a scan over chunks with that backward, in plain JAX
pallas_tpu.py  the same as kernels for TPU, with tpu_inverse.py, tpu_layout.py
pallas_gpu.py  the same for Hopper GPUs, with gpu_chunks.py, gpu_layout.py
native_cpu.py  the same for CPUs in C++, native_cpu.cc
contract.py    what its backends take and return (``../backends.py``)
api.py         the public functions and the table of implementations
"""

from .api import delta_product, delta_product_step

__all__ = ["delta_product", "delta_product_step"]
