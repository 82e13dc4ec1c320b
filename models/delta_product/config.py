"""The configuration of a DeltaProduct language model: names, meaning and validity.

Field names are those of the published configuration where it has the field. There are no
defaults here: ``configs/base.py`` is the one place that declares them.
"""

import dataclasses
import math

from ...kernels.delta_product.api import IMPLEMENTATIONS
from ..limits import DTYPES, at_least, one_of

ACTIVATIONS = ("silu", "identity")


@dataclasses.dataclass(frozen=True)
class DeltaProductConfig:
    """Sizes and switches of the model.

    Attributes:
      vocab_size: number of token ids.
      hidden_size: width of the residual stream.
      num_hidden_layers: number of blocks.
      num_heads: query/key heads.
      num_v_heads: value heads, a multiple of ``num_heads``; 0 means ``num_heads``.
      head_dim: width of a query/key head.
      expand_v: width of a value head, as a multiple of ``head_dim``.
      num_householder: Householder steps per token.
      intermediate_size: width of the SwiGLU; 0 means 8/3 of hidden_size, rounded up to 256s.
      use_short_conv: depthwise causal convolution on q, k and v.
      conv_size: its width.
      activation: of q, k and v: "silu" (published) or "identity".
      use_forget_gate: one learned decay per token and head (gated DeltaProduct).
      use_output_gate: multiply the normalised output with silu of a projection.
      allow_neg_eigval: beta in (0, 2), eigenvalues in [-1, 1]; else (0, 1) and [0, 1].
      tie_word_embeddings: the embedding matrix is the output head too.
      norm_eps: epsilon of every RMSNorm.
      initializer_range: standard deviation of every initial weight matrix.
      dtype: of the computation. Decay, state and logits are float32 or better.
      param_dtype: of the parameters; those of the decay are float32 or better.
      remat: recompute each block in the backward instead of storing its activations.
      implementation: of the scan: "auto", or a name that ``delta_product`` knows. With "xla" and
        "reference" the short convolutions are plain JAX as well.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    num_v_heads: int
    head_dim: int
    expand_v: float
    num_householder: int
    intermediate_size: int
    use_short_conv: bool
    conv_size: int
    activation: str
    use_forget_gate: bool
    use_output_gate: bool
    allow_neg_eigval: bool
    tie_word_embeddings: bool
    norm_eps: float
    initializer_range: float
    dtype: str
    param_dtype: str
    remat: bool
    implementation: str

    def __post_init__(self):
        positive = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim")
        at_least(self, 1, *positive, "num_householder", "conv_size")
        if self.intermediate_size < 0:
            raise ValueError(
                f"model.intermediate_size must be at least 0, got {self.intermediate_size}"
            )
        if self.num_v_heads < 0 or self.value_heads % self.num_heads:
            raise ValueError(
                f"model.num_v_heads ({self.num_v_heads}) must be a multiple of model.num_heads"
                f" ({self.num_heads}), or 0 for the same number"
            )
        if self.value_dim < 1 or not math.isclose(self.head_dim * self.expand_v, self.value_dim):
            raise ValueError(
                f"model.head_dim * model.expand_v must be a whole number of at least 1, got"
                f" {self.head_dim} * {self.expand_v}"
            )
        one_of(self, ACTIVATIONS, "activation")
        one_of(self, DTYPES, "dtype", "param_dtype")
        one_of(self, ("auto", *IMPLEMENTATIONS), "implementation")

    @property
    def value_heads(self) -> int:
        return self.num_v_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        return round(self.head_dim * self.expand_v)

    @property
    def mlp_size(self) -> int:
        return self.intermediate_size or 256 * -(-int(self.hidden_size * 8 / 3) // 256)
