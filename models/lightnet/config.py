"""The configurations of LightNet's models: names, meaning and validity.

Field names are those of the published configuration where it has the field. There are no
defaults here: ``configs/base.py`` is the one place that declares them.
"""

import dataclasses

from ...kernels.additive_scan.api import IMPLEMENTATIONS
from ..limits import DTYPES, at_least, one_of
from . import lrpe

MIXERS = ("lightnet", "softmax", "linear", "gla", "gla_two_scans")
GATES = ("silu", "sigmoid", "none")
TPES = ("none", "causal", "bidirectional")


@dataclasses.dataclass(frozen=True)
class LightNetConfig:
    """The stack of blocks that all models share.

    Attributes:
      mixer: "lightnet", or a baseline in its place: "softmax" attention, "linear" attention
        (elu + 1), gated linear attention in one scan ("gla") or two ("gla_two_scans").
      hidden_size: width of the residual stream, and of all values.
      num_hidden_layers: number of blocks.
      num_heads: divides hidden_size.
      head_dim: width of a query/key head; 0 means hidden_size / num_heads.
      scale: of the queries; 0 means head_dim**-0.5.
      output_gate: "silu" after the output norm (published), "sigmoid" before it (the author's
        later code), or "none". Softmax attention has neither gate nor norm.
      gate_low_rank_dim: rank of the gate's projection.
      elementwise_affine: the output norm has weights.
      intermediate_size: width of the SwiGLU; 0 means 8/3 of hidden_size, rounded up to 256s.
      use_short_conv: depthwise causal convolution on q, k and v; language models only.
      conv_size: its width.
      tpe: MD-TPE on the embedded tokens: "none", "causal" or "bidirectional" along every axis.
      tpe_share_axes: one set of its parameters for all axes.
      use_lrpe: MD-LRPE on queries and keys in every layer.
      theta_type: its rates: 0, different for every head; 1 to 6, the published tables (rotate:
        all, low, high; cosine: all, low, high).
      learn_theta: the rates are parameters, beginning there.
      norm_eps: epsilon of every RMSNorm but the output norm's.
      initializer_range: standard deviation of every initial weight matrix.
      dtype: of the computation. Keys are summed, and the state is kept, in float32 or better.
      param_dtype: of the parameters.
      remat: recompute each block in the backward instead of storing its activations.
      implementation: of the scan: "auto", or a name that ``additive_scan`` knows. With "xla" and
        "reference" the short convolutions are plain JAX as well.
    """

    mixer: str
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    scale: float
    output_gate: str
    gate_low_rank_dim: int
    elementwise_affine: bool
    intermediate_size: int
    use_short_conv: bool
    conv_size: int
    tpe: str
    tpe_share_axes: bool
    use_lrpe: bool
    theta_type: int
    learn_theta: bool
    norm_eps: float
    initializer_range: float
    dtype: str
    param_dtype: str
    remat: bool
    implementation: str

    def __post_init__(self):
        at_least(self, 1, "hidden_size", "num_hidden_layers", "num_heads", "conv_size")
        at_least(self, 0, "head_dim", "intermediate_size", "scale")
        if self.output_gate != "none":
            at_least(self, 1, "gate_low_rank_dim")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must divide model.hidden_size"
                f" ({self.hidden_size})"
            )
        one_of(self, MIXERS, "mixer")
        one_of(self, GATES, "output_gate")
        one_of(self, TPES, "tpe")
        one_of(self, DTYPES, "dtype", "param_dtype")
        one_of(self, ("auto", *IMPLEMENTATIONS), "implementation")
        if self.theta_type not in (0, *lrpe.THETA_TYPES):
            raise ValueError(f"model.theta_type must be 0 to 6, got {self.theta_type}")
        if self.use_lrpe and lrpe.is_rotation(self.theta_type) and self.key_dim % 2:
            raise ValueError(
                f"model.theta_type={self.theta_type} turns pairs of channels, but the heads'"
                f" width is {self.key_dim}: make it even, or take a cosine type (0, 4, 5, 6)"
            )

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def state_dim(self) -> int:
        """Rows of a head's state: the cosine form, and a split rotation, double them."""
        split = self.mixer == "lightnet" or not lrpe.is_rotation(self.theta_type)
        return self.key_dim * (2 if self.use_lrpe and split else 1)

    @property
    def value_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def query_scale(self) -> float:
        return self.scale or self.key_dim**-0.5

    @property
    def knows_segments(self) -> bool:
        return self.mixer in ("lightnet", "softmax")

    @property
    def mlp_size(self) -> int:
        return self.intermediate_size or 256 * -(-int(self.hidden_size * 8 / 3) // 256)


@dataclasses.dataclass(frozen=True)
class LightNetLMConfig(LightNetConfig):
    """A language model.

    Attributes:
      vocab_size: number of token ids.
      tie_word_embeddings: the embedding matrix is the output head too.
      causal: predicts the next token; else every token sees the whole row (masked language
        modelling).
    """

    vocab_size: int
    tie_word_embeddings: bool
    causal: bool

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "vocab_size")
        if self.causal and (self.tpe == "bidirectional" or self.mixer == "gla_two_scans"):
            raise ValueError(
                "model.tpe=bidirectional and model.mixer=gla_two_scans look ahead: they are not"
                " for a causal language model"
            )
        if self.use_short_conv and not self.causal:
            raise ValueError("model.use_short_conv is for causal language models")


@dataclasses.dataclass(frozen=True)
class LightNetGridConfig(LightNetConfig):
    """A classifier of images, or of anything else on a grid of one, two or three axes.

    Attributes:
      num_classes: outputs.
      patch_size: along every axis of the grid.
      class_token: a token without a place whose last state is classified, instead of the mean.
      drop_path: probability of leaving a residual branch out in training, in the last layer;
        it rises linearly from 0 in the first (stochastic depth).
    """

    num_classes: int
    patch_size: tuple[int, ...]
    class_token: bool
    drop_path: float

    def __post_init__(self):
        super().__post_init__()
        check_patches(self)
        at_least(self, 1, "num_classes")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path must be in [0, 1), got {self.drop_path}")


@dataclasses.dataclass(frozen=True)
class LightNetDiTConfig(LightNetConfig):
    """The backbone of a diffusion or flow model (Peebles and Xie 2023).

    Attributes:
      patch_size: along both axes of the images.
      num_classes: of the condition; 0 for none. One more label stands for "no class".
      learn_sigma: twice the channels come out: mean and variance.
    """

    patch_size: tuple[int, ...]
    num_classes: int
    learn_sigma: bool

    def __post_init__(self):
        super().__post_init__()
        check_patches(self)
        at_least(self, 0, "num_classes")


def check_patches(c) -> None:
    """Raises a ValueError for an impossible patch, or a convolution over a grid."""
    if not c.patch_size or min(c.patch_size) < 1:
        raise ValueError(f"model.patch_size must be positive sizes, got {c.patch_size}")
    if c.use_short_conv:
        raise ValueError("model.use_short_conv is for causal language models")
