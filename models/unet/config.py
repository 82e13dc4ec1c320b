"""The configurations of the U-Nets: names, meaning and validity.

Names are those of EDM's code, which has all three networks' parts. There are no defaults here:
``configs/base.py`` is the one place that declares them.
"""

import dataclasses

from ..limits import DTYPES, at_least, one_of
from .resample import NEAREST, Taps, check_taps

EMBEDDINGS = ("positional", "fourier")
PROGRESSIVE = ("none", "output_skip")
PROGRESSIVE_INPUT = ("none", "input_skip", "residual")
ENCODERS = ("standard", "residual")
PARAMETERISATIONS = ("velocity", "edm")
CHANNELS_PER_HEAD = 64  # of DhariwalUNet


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """What all three networks have.

    Attributes:
      image_size: height and width of the images; every level but the first halves them.
      channels: of the images.
      model_channels: the unit of width, a multiple of 4.
      channel_mult: width of every level, from the images' size down, in that unit.
      num_blocks: residual blocks of a level on the way down; one more on the way up.
      attn_resolutions: heights at which there is self-attention.
      dropout: probability, in every residual block; to 1 / 65536.
      dtype: of the computation. Norms and softmax are in float32 or better.
      param_dtype: of the parameters.
      remat: recompute each block in the backward instead of storing its activations.
    """

    image_size: int
    channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float
    dtype: str
    param_dtype: str
    remat: bool

    def __post_init__(self):
        at_least(self, 1, "image_size", "channels", "num_blocks")
        if self.model_channels < 4 or self.model_channels % 4:
            raise ValueError(
                f"model.model_channels must be a multiple of 4, got {self.model_channels}"
            )
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"model.channel_mult must be positive, got {self.channel_mult}")
        halved = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % halved:
            raise ValueError(
                f"model.channel_mult {self.channel_mult} halves the images"
                f" {len(self.channel_mult) - 1} times, but model.image_size is {self.image_size}:"
                f" make it a multiple of {halved}, or give fewer levels"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {self.dropout}")
        one_of(self, DTYPES, "dtype", "param_dtype")
        for level, mult in enumerate(self.channel_mult):
            self._check_width(level, mult * self.model_channels)

    def _check_width(self, level: int, width: int) -> None:
        """The norm's groups must divide all widths, those of the sums with skips too."""
        above = self.channel_mult[level - 1] * self.model_channels if level else self.model_channels
        for size in (width, 2 * width, width + above):
            groups = min(32, size // 4)
            if size % groups:
                raise ValueError(
                    f"model.model_channels {self.model_channels} x model.channel_mult"
                    f" {self.channel_mult} gives a norm over {size} channels, which its {groups}"
                    " groups do not divide; multiples of 32 always work"
                )

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(height and width of the images, channels) of every level, from the images down."""
        mults = enumerate(self.channel_mult)
        return [(self.image_size >> level, mult * self.model_channels) for level, mult in mults]


@dataclasses.dataclass(frozen=True)
class NCSNppConfig(UNetConfig):
    """NCSN++ and DDPM++ (Song et al. 2021) with blocks of BigGAN's type; no classes.

    Attributes:
      embedding_type: of the time: "positional", of 999 t, or "fourier", of ln(999 t).
      fourier_scale: standard deviation of the rates of "fourier".
      fir: halve and double with ``fir_kernel``; else by the mean of 2 x 2 and by repeating.
      fir_kernel: symmetric and of even length.
      progressive: "output_skip": every level adds to the image; "none": the last one makes it.
      progressive_input: "input_skip" and "residual": every level reads the image, halved; added
        by a projection (the first), or by a convolution that goes on to the next level (the
        second, which needs ``fir``).
      skip_rescale: every sum with a branch is divided by sqrt 2.
      scale_by_sigma: the output is divided by 999 t; needs "fourier".
      init_scale: variance of the last layers of all branches, relative to that of the others;
        0 stands for 1e-10.
    """

    embedding_type: str
    fourier_scale: float
    fir: bool
    fir_kernel: Taps
    progressive: str
    progressive_input: str
    skip_rescale: bool
    scale_by_sigma: bool
    init_scale: float

    def __post_init__(self):
        super().__post_init__()
        one_of(self, EMBEDDINGS, "embedding_type")
        if self.progressive == "residual":
            raise ValueError(
                "model.progressive=residual does not run in the published code either; take"
                " output_skip, or none"
            )
        one_of(self, PROGRESSIVE, "progressive")
        one_of(self, PROGRESSIVE_INPUT, "progressive_input")
        check_taps("fir_kernel", self.fir_kernel)
        if self.progressive_input == "residual" and not self.fir:
            raise ValueError("model.progressive_input=residual needs model.fir=true")
        if self.scale_by_sigma and self.embedding_type != "fourier":
            raise ValueError("model.scale_by_sigma needs model.embedding_type=fourier")

    @property
    def taps(self) -> Taps:
        return self.fir_kernel if self.fir else NEAREST


@dataclasses.dataclass(frozen=True)
class EDMConfig(UNetConfig):
    """What both networks of EDM's code have (Karras et al. 2022).

    Attributes:
      parameterisation: "velocity": the network's output at the label 999 t; "edm": the velocity
        of EDM's denoiser, in which the network is one part (see ``edm_velocity``).
      sigma_data: standard deviation of the data; for "edm".
      num_classes: of the condition; 0 for none. One more label stands for "no class".
      augment_dim: length of the augmentation's description; 0 for none. It is 0 but in training.
      channel_mult_emb: width of the embedding, in the unit.
    """

    parameterisation: str
    sigma_data: float
    num_classes: int
    augment_dim: int
    channel_mult_emb: int

    def __post_init__(self):
        super().__post_init__()
        one_of(self, PARAMETERISATIONS, "parameterisation")
        if self.sigma_data <= 0:
            raise ValueError(f"model.sigma_data must be positive, got {self.sigma_data}")
        for name, least in (("num_classes", 0), ("augment_dim", 0), ("channel_mult_emb", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"model.{name} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class SongUNetConfig(EDMConfig):
    """EDM's version of NCSN++ and DDPM++.

    Attributes:
      embedding_type: of the noise label: "positional" or "fourier".
      channel_mult_noise: width of its features, in the unit.
      encoder_type: "residual": every level reads the image, halved; or "standard".
      resample_filter: for halving and doubling; symmetric and of even length.
    """

    embedding_type: str
    channel_mult_noise: int
    encoder_type: str
    resample_filter: Taps

    def __post_init__(self):
        super().__post_init__()
        one_of(self, EMBEDDINGS, "embedding_type")
        one_of(self, ENCODERS, "encoder_type")
        check_taps("resample_filter", self.resample_filter)
        if self.channel_mult_noise < 1:
            raise ValueError("model.channel_mult_noise must be at least 1")


@dataclasses.dataclass(frozen=True)
class DhariwalUNetConfig(EDMConfig):
    """EDM's version of ADM (Dhariwal and Nichol 2021).

    Attention has one head per 64 channels, and is left out where there are fewer channels: so do
    the published networks.
    """
