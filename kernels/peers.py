"""Other people's implementations of the same operation, for the benchmark, where installed.

A peer takes the arguments of ``delta_product`` as numpy arrays and returns two functions to time,
forward and forward with backward; each returns its outputs as numpy arrays [B, T, H, V].
"""

from collections.abc import Callable
import importlib.util

import numpy as np

Timed = tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]


def transformers(q, k, v, beta, g) -> Timed:
    """``torch_chunk_gated_delta_rule`` of the transformers package: what CPU users of it run.

    It knows one delta step per token, so that the N steps become N tokens: queries are zero but
    at the last, decays zero but at the first.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers.models.qwen3_next import (  # pyright: ignore[reportMissingImports]
        modeling_qwen3_next as published,
    )

    batch, tokens, heads, key_dim = q.shape
    steps = k.shape[2]
    long_q = np.zeros((batch, tokens, steps, heads, key_dim), np.float32)
    long_g = np.zeros((batch, tokens, steps, heads), np.float32)
    long_q[:, :, -1] = q
    if g is not None:
        long_g[:, :, 0] = g
    arrays = [x.reshape(batch, tokens * steps, *x.shape[3:]) for x in (long_q, k, v, long_g, beta)]
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]

    def forward(tensors):
        return published.torch_chunk_gated_delta_rule(*tensors)[0][:, steps - 1 :: steps]

    def both() -> np.ndarray:
        o = forward(inputs)
        torch.autograd.grad(o.square().sum(), inputs)
        return o.detach().numpy()

    def alone() -> np.ndarray:
        with torch.no_grad():
            return forward(inputs).numpy()

    return alone, both


def installed() -> dict[str, Callable[..., Timed]]:
    """The peers that can run here, by name."""
    needed = {"transformers": (transformers, ("torch", "transformers"))}
    found = importlib.util.find_spec
    return {name: peer for name, (peer, packages) in needed.items() if all(map(found, packages))}
