"""DDPM++ in PyTorch, for the benchmark to compare with: no pyramids, no filters, no dropout.

Dimensions: B batch, H height, W width, C channels, N modules.

The network is functions of the tensors that ``to_torch`` gives, by their published names, so that
both sides compute the same thing. Layers are PyTorch's own; images are NCHW, as the published code
has them, or in memory channels last.
"""

from collections.abc import Callable
import itertools
import math
import os

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from .config import NCSNppConfig
from .ncsnpp import LABEL_SCALE

Tensors = dict[str, torch.Tensor]


def velocity(c: NCSNppConfig, w: Tensors, x_BCHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] images and [B] times -> [B, C, H, W]."""
    numbers = map(str, itertools.count())

    def here() -> Callable[[str], torch.Tensor]:
        prefix = f"all_modules.{next(numbers)}."
        return lambda name: w[prefix + name]

    def conv(h, p, name="", pad=1):
        return F.conv2d(h, p(f"{name}weight"), p(f"{name}bias"), padding=pad)

    def norm(h, p, name=""):
        groups = min(h.shape[1] // 4, 32)
        return F.group_norm(h, groups, p(f"{name}weight"), p(f"{name}bias"), 1e-6)

    def block(h, resample=None):
        p, change = here(), resample or (lambda x: x)
        x, h = change(h), conv(change(F.silu(norm(h, p, "GroupNorm_0."))), p, "Conv_0.")
        h = h + F.linear(active, p("Dense_0.weight"), p("Dense_0.bias"))[:, :, None, None]
        h = conv(F.silu(norm(h, p, "GroupNorm_1.")), p, "Conv_1.")
        if resample or x.shape[1] != h.shape[1]:
            x = conv(x, p, "Conv_2.", 0)
        return (x + h) / math.sqrt(2)

    def attend(x):
        p, (batch, channels, *sides) = here(), x.shape
        h = norm(x, p, "GroupNorm_0.").flatten(2).transpose(1, 2)
        q, k, v = (h @ p(f"NIN_{i}.W") + p(f"NIN_{i}.b") for i in range(3))
        o = torch.softmax(q @ k.transpose(1, 2) * channels**-0.5, dim=-1) @ v
        o = o @ p("NIN_3.W") + p("NIN_3.b")
        return (x + o.transpose(1, 2).reshape(batch, channels, *sides)) / math.sqrt(2)

    half = c.model_channels // 2
    rate = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32) / (half - 1))
    angle = LABEL_SCALE * t_B[:, None] * rate
    p, q = here(), here()
    first = F.linear(torch.cat([angle.sin(), angle.cos()], 1), p("weight"), p("bias"))
    active = F.silu(F.linear(F.silu(first), q("weight"), q("bias")))

    h = conv(x_BCHW, here())
    skips = [h]
    for level, (size, _) in enumerate(c.levels):
        if level:
            h = block(h, lambda x: F.avg_pool2d(x, 2))
            skips.append(h)
        for _ in range(c.num_blocks):
            h = block(h)
            h = attend(h) if size in c.attn_resolutions else h
            skips.append(h)
    h = block(attend(block(h)))
    for level, (size, _) in reversed([*enumerate(c.levels)]):
        for _ in range(c.num_blocks + 1):
            h = block(torch.cat([h, skips.pop()], 1))
        h = attend(h) if size in c.attn_resolutions else h
        if level:
            h = block(h, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
    h = F.silu(norm(h, here()))
    return conv(h, here())


class Trainer:
    """A network in PyTorch with its optimizer and a batch.

    Args of the constructor:
      tensors: by published name.
      arrays: x [B, H, W, C], t [B] and target [B, H, W, C].
      channels_last: of images and kernels in memory.
    """

    def __init__(
        self,
        c: NCSNppConfig,
        tensors: dict[str, np.ndarray],
        arrays: list[np.ndarray],
        channels_last: bool,
        learning_rate: float,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        form = torch.channels_last if channels_last else torch.contiguous_format
        place = lambda x: x.contiguous(memory_format=form) if x.ndim == 4 else x.contiguous()
        make = lambda x: place(torch.tensor(np.asarray(x)))
        self.config = c
        self.weights = {name: make(x).requires_grad_() for name, x in tensors.items()}
        x, t, target = arrays
        to_nchw = lambda y: make(np.moveaxis(y, -1, 1))
        self.x, self.t, self.target = to_nchw(x), make(t), to_nchw(target)
        self.optimizer = torch.optim.Adam(
            [*self.weights.values()], lr=learning_rate, eps=1e-8, fused=True
        )

    def velocity(self) -> np.ndarray:
        """[B, H, W, C]."""
        with torch.no_grad():
            y = velocity(self.config, self.weights, self.x, self.t)
        return np.moveaxis(y.numpy(), 1, -1)

    def train(self) -> None:
        """One update."""
        y = velocity(self.config, self.weights, self.x, self.t)
        self.optimizer.zero_grad()
        F.mse_loss(y, self.target).backward()
        self.optimizer.step()

    def sample(self, steps: int, least_time: float) -> None:
        """Euler's method from noise."""
        x = self.x
        with torch.no_grad():
            for i in range(steps):
                t = torch.full(self.t.shape, i / steps * (1 - least_time) + least_time)
                x = x + velocity(self.config, self.weights, x, t) / steps
