"""Configuration of RADD's transformer, and its published sizes."""

import dataclasses

from ..limits import DTYPES, at_least, one_of

SIZES = {  # Ou et al. 2025, with GPT-2's tokens: 162,265,682 and 405,191,762 parameters
    "small": {"hidden_size": 768, "num_hidden_layers": 12, "num_heads": 12, "dropout": 0.02},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 16, "dropout": 0.02},
}


@dataclasses.dataclass(frozen=True)
class RADDConfig:
    """A bidirectional transformer that is not told the time.

    Attributes:
      vocab_size: tokens and, behind them, the mask; not more, since the mask is the last.
      hidden_size: a multiple of twice num_heads (rotary positions turn pairs of channels).
      num_hidden_layers: blocks.
      num_heads: of the attention.
      dropout: on both branches of each block, in training.
      rope_theta: base of the rotary positions.
      dtype: of the computation. Norms, softmax and the logits are in float32 or better.
      param_dtype: of the parameters.
      remat: recompute each block in the backward instead of storing its activations.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    dropout: float
    rope_theta: float
    dtype: str
    param_dtype: str
    remat: bool

    def __post_init__(self):
        at_least(self, 1, "hidden_size", "num_hidden_layers", "num_heads")
        if self.vocab_size < 2:
            raise ValueError(
                f"model.vocab_size must be at least 2 (a token and the mask), got {self.vocab_size}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) must be a multiple of twice"
                f" model.num_heads ({self.num_heads})"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {self.dropout}")
        one_of(self, DTYPES, "dtype", "param_dtype")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
