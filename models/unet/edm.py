"""The two networks of EDM's code (Karras et al. 2022): SongUNet, of the NCSN++ kind, and ADM.

Dimensions: B batch, H height, W width, C channels, E embedding, K classes, A augmentation.

Submodules are named as there, with the height and width at which they work.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ..rectified_flow.diffusion import edm_velocity
from .blocks import Residual, Style
from .config import CHANNELS_PER_HEAD, DhariwalUNetConfig, SongUNetConfig
from .edm_embedding import ADMEmbedding, SongEmbedding
from .layers import Conv, GroupNorm, Init, block_keys, check_images
from .ncsnpp import LABEL_SCALE
from .resample import NEAREST, smooth


class EDMUNet(nn.Module):
    """Velocity of an image at a time, for a class: SongUNet or ADM, by the config's type."""

    config: SongUNetConfig | DhariwalUNetConfig

    def __call__(self, x_BHWC, t_B, label_B=None, *, keys=None) -> jax.Array:
        """The velocity dX_t/dt; t = 0 is noise and t = 1 data.

        Args:
          x_BHWC: [B, H, W, C] images at time t; H and W are ``image_size``.
          t_B: [B] times in [0, 1]; ``edm_velocity`` tells what happens at both ends.
          label_B: [B] int classes, ``num_classes`` for "no class"; None for "no class" in all rows.
          keys: [B] PRNG keys of the dropout, one per row; None (evaluation) drops nothing.

        Returns:
          [B, H, W, C], float32 or better.

        Raises:
          ValueError: for labels where there are no classes, or images of another size.
        """
        c = self.config
        class_BK = None
        if label_B is not None:
            if not c.num_classes:
                raise ValueError("model.num_classes is 0: leave the labels out, or set it")
            class_BK = jax.nn.one_hot(label_B, c.num_classes, dtype=c.dtype)
        network = lambda x, noise_B: self.raw(x, noise_B, class_BK, keys=keys)
        if c.parameterisation == "velocity":
            return network(x_BHWC, LABEL_SCALE * t_B)
        return edm_velocity(network, x_BHWC, t_B, c.sigma_data)

    @nn.compact
    def raw(self, x_BHWC, noise_B, class_BK=None, augment_BA=None, keys=None) -> jax.Array:
        """The published network F.

        Args:
          x_BHWC, keys: as above.
          noise_B: [B] noise labels.
          class_BK: [B, num_classes], one-hot or 0 for "no class"; None for 0.
          augment_BA: [B, augment_dim]; None for 0.

        Returns:
          As above.
        """
        c, n = self.config, _network(self.config)
        check_images(c, x_BHWC)
        s = n.style
        own_keys = block_keys(keys)
        conv = functools.partial(Conv, dtype=c.dtype, param_dtype=c.param_dtype)
        block_of: Any = nn.remat(Residual) if c.remat else Residual
        embedding_BE = n.embedding(c, s.start, name="map")(noise_B, class_BK, augment_BA)

        def block(h, width, name, resample="", attention=False):
            heads = n.heads(width) if attention else 0
            return block_of(s, width, resample, heads, name=name)(h, embedding_BE, next(own_keys))

        def read(h, pyramid, level, name):
            """h and the halved image, as both are now."""
            axes = ("pixels" if level == 1 else "embed", "mlp")
            shrink = conv(h.shape[-1], 3, s.start, axes=axes, name=name)
            smoothed = smooth(pyramid, s.taps, len(s.taps) // 2)
            return (h + shrink(smoothed, stride=2, pad=0)) * s.skip_scale

        x, name = x_BHWC.astype(c.dtype), f"{_at('enc', c.image_size)}_conv"
        h = conv(c.model_channels, 3, s.start, axes=("pixels", "mlp"), name=name)(x)
        skips, pyramid = [h], x
        for level, (size, width) in enumerate(c.levels):
            name = _at("enc", size)
            if level:
                h = block(h, h.shape[-1], f"{name}_down", "down")
                if n.reads_images:
                    h = pyramid = read(h, pyramid, level, f"{name}_aux_residual")
                skips.append(h)
            for i in range(c.num_blocks):
                h = block(h, width, f"{name}_block{i}", "", size in c.attn_resolutions)
                skips.append(h)
        name, width = _at("dec", c.levels[-1][0]), h.shape[-1]
        h = block(block(h, width, f"{name}_in0", "", True), width, f"{name}_in1")
        for level, (size, width) in reversed([*enumerate(c.levels)]):
            name = _at("dec", size)
            if level < len(c.levels) - 1:
                h = block(h, h.shape[-1], f"{name}_up", "up")
            for i in range(c.num_blocks + 1):
                attention = size in c.attn_resolutions and (n.attends_always or i == c.num_blocks)
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, width, f"{name}_block{i}", "", attention)
        h = nn.silu(GroupNorm(s.eps, c.dtype, c.param_dtype, name=n.output_norm)(h))
        y = conv(c.channels, 3, s.last, axes=("embed", "pixels"), name=n.output)(h)
        return y.astype(accumulation_dtype(y.dtype))


@dataclasses.dataclass(frozen=True)
class _Network:
    """In what the two differ.

    Attributes:
      style: of the blocks.
      embedding: module of noise, class and augmentation.
      heads: of the attention over so many channels; 0 leaves it out.
      attends_always: in every block on the way up, where there is attention; else in the last one.
      reads_images: every level reads the image, halved.
      output_norm, output: names of the last layers.
    """

    style: Style
    embedding: Any
    heads: Callable[[int], int]
    attends_always: bool
    reads_images: bool
    output_norm: str
    output: str


def _network(c: SongUNetConfig | DhariwalUNetConfig) -> _Network:
    shared = {"dropout": c.dropout, "dtype": c.dtype, "param_dtype": c.param_dtype}
    shared["silu_embedding"] = False
    if isinstance(c, SongUNetConfig):
        style = Style(
            eps=1e-6,
            skip_scale=0.5**0.5,
            adaptive=False,
            project=True,
            taps=c.resample_filter,
            start=Init(_xavier(1.0)),
            last=Init(_xavier(1e-5)),
            qkv=Init(_xavier(0.2**0.5)),
            **shared,
        )
        name, reads = _at("dec", c.image_size), c.encoder_type == "residual"
        last = f"{name}_aux_norm", f"{name}_aux_conv"
        return _Network(style, SongEmbedding, lambda width: 1, False, reads, *last)
    init = Init(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), bias=1.0)
    style = Style(
        eps=1e-5,
        skip_scale=1.0,
        adaptive=True,
        project=False,
        taps=NEAREST,
        start=init,
        last=Init(nn.initializers.zeros),
        qkv=init,
        **shared,
    )
    heads = lambda width: width // CHANNELS_PER_HEAD
    return _Network(style, ADMEmbedding, heads, True, False, "out_norm", "out_conv")


def _at(side: str, size: int) -> str:
    return f"{side}_{size}x{size}"


def _xavier(factor: float):
    """``factor`` times the uniform initialiser of Glorot and Bengio 2010."""
    return nn.initializers.variance_scaling(factor**2, "fan_avg", "uniform")
