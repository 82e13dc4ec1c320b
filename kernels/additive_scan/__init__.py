"""The additive linear recurrence: values averaged by a softmax over time, per key channel.

reference.py   the definition, one token after another
quotients.py   one chunk with one reference for all its tokens, forward and backward
chunk.py       one chunk for keys of any size, forward and backward
xla.py         a scan over chunks with these, in plain JAX
pallas_tpu.py  the same as kernels for TPU, with tpu_tree.py, tpu_layout.py
pallas_gpu.py  the same for Hopper GPUs, with gpu_chunks.py, gpu_layout.py
native_cpu.py  the same for CPUs in C++, native_cpu.cc
contract.py    what its backends take and return (``../backends.py``)
attention.py   the non-causal form, which needs no scan
api.py         the public functions and the table of implementations
"""

from .api import additive_attention, additive_scan, additive_step

__all__ = ["additive_attention", "additive_scan", "additive_step"]
