"""Configurations of language models with a mixture of experts in every layer."""

import dataclasses
from typing import Any

from ..delta_product import DeltaProductConfig
from ..lightnet import LightNetLMConfig
from . import losses
from .router import RouterConfig

# Token mixers and the keys that only they have, with the defaults, where others must leave them.
MIXERS = {
    "attention": {"num_kv_heads": 0, "rope_theta": 1e4},
    "delta_product": {"num_householder": 2, "use_forget_gate": False, "use_short_conv": True},
    "lightnet": {},
}
# What the others are here, beyond the keys that the models share: their families' defaults.
_DELTA_PRODUCT = {
    "num_v_heads": 0,
    "expand_v": 1.0,
    "intermediate_size": 0,
    "conv_size": 4,
    "activation": "silu",
    "use_output_gate": True,
    "allow_neg_eigval": True,
    "implementation": "auto",
}
_LIGHTNET = {
    "scale": 0.0,
    "output_gate": "silu",
    "gate_low_rank_dim": 16,
    "elementwise_affine": True,
    "intermediate_size": 0,
    "use_short_conv": False,
    "conv_size": 4,
    "tpe": "causal",
    "tpe_share_axes": False,
    "use_lrpe": True,
    "theta_type": 0,
    "learn_theta": False,
    "causal": True,
    "implementation": "auto",
}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What both kinds of models share.

    Attributes:
      vocab_size, hidden_size, num_hidden_layers, num_heads: of the model.
      intermediate_size: an expert's width.
      num_experts, experts_per_token: of each layer, and how many of them a token goes to.
      router_cell, router_memory, router_projector, router_dim, router_head, router_head_dim,
        router_residual, router_residual_detach, router_residual_cumulative, router_bias,
        router_normalise: see ``RouterConfig``.
      capacity_factor: 0: no token is dropped; else see ``scanax.kernels.expert_mlp``: in training
        alone, as evaluation and generation drop none. Where a mesh
        divides the batch, each device drops by its own tokens.
      capacity_policy: who keeps a place: "score" or "position".
      balance_form, balance_coefficient: see ``losses.balance``.
      z_coefficient: on ``losses.z_loss``.
      router_balance_rate: 0; or an update adds so much to the preference for every expert that
        was chosen less often than the mean in its layer, and takes it from the others; the
        preference counts in the choice alone (Wang et al. 2024).
      norm_eps: of all norms.
      dtype, param_dtype: of computation and parameters.
      remat: recompute layers in the backward; the experts that were chosen are kept.
      implementation: of ``scanax.kernels.expert_mlp``; "auto" chooses.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    router_cell: str
    router_memory: str
    router_projector: bool
    router_dim: int
    router_head: str
    router_head_dim: int
    router_residual: float
    router_residual_detach: bool
    router_residual_cumulative: bool
    router_bias: bool
    router_normalise: bool
    capacity_factor: float
    capacity_policy: str
    balance_form: str
    balance_coefficient: float
    z_coefficient: float
    router_balance_rate: float
    norm_eps: float
    dtype: str
    param_dtype: str
    remat: bool
    implementation: str

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size})"
            )
        for name in ("capacity_factor", "router_balance_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.balance_form not in losses.FORMS:
            raise ValueError(
                f"balance_form {self.balance_form!r} must be one of {', '.join(losses.FORMS)}"
            )
        _ = self.router

    @property
    def router(self) -> RouterConfig:
        """The router, without the prefix of its keys."""
        names = [field.name for field in dataclasses.fields(RouterConfig)]
        own = lambda n: f"router_{n}" if hasattr(self, f"router_{n}") else n
        values = {n: getattr(self, own(n)) for n in names}
        return RouterConfig(**values)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class RMoEConfig(MoEConfig):
    """A pre-norm model (RMSNorm, token mixer, SwiGLU experts): the paper's large models.

    Attributes:
      mixer: "attention", rotary (published), "delta_product" or "lightnet". These two are the
        layers of their families with heads of hidden_size / num_heads, and where no key here says
        otherwise with those families' defaults.
      num_kv_heads: attention: of keys and values; 0 for num_heads.
      rope_theta: attention: base of the rotary angles.
      num_householder, use_forget_gate, use_short_conv: delta_product: see ``DeltaProductConfig``.
      num_dense_layers: how many of the layers, the first ones, have a SwiGLU and no experts.
      dense_intermediate_size: its width.
      shared_expert_size: width of a SwiGLU that all tokens go through; 0 for none.
      shared_weight, moe_weight: factors on its output and on the experts', where there is one.
      moe_bias: a learned vector on the experts' output.
      tie_word_embeddings: the head is the embedding.
      initializer_range: standard deviation of the initial matrices.
    """

    mixer: str
    num_kv_heads: int
    rope_theta: float
    num_householder: int
    use_forget_gate: bool
    use_short_conv: bool
    num_dense_layers: int
    dense_intermediate_size: int
    shared_expert_size: int
    shared_weight: float
    moe_weight: float
    moe_bias: bool
    tie_word_embeddings: bool
    initializer_range: float

    def __post_init__(self):
        super().__post_init__()
        self._check_mixer()
        if self.mixer == "attention" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads ({self.head_dim}) must be even: rotary angles turn pairs"
                " of channels"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads ({self.kv_heads}) must divide num_heads ({self.num_heads})"
            )
        if not 0 <= self.num_dense_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_dense_layers ({self.num_dense_layers}) must leave a layer with experts of"
                f" {self.num_hidden_layers}"
            )
        if self.num_dense_layers and self.dense_intermediate_size < 1:
            raise ValueError("num_dense_layers needs dense_intermediate_size")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def mixing(self) -> Any:
        """The mixer's configuration in its own family; None for attention."""
        own = {
            "delta_product": (DeltaProductConfig, _DELTA_PRODUCT),
            "lightnet": (LightNetLMConfig, _LIGHTNET),
        }
        if self.mixer not in own:
            return None
        kind, fixed = own[self.mixer]
        names = [field.name for field in dataclasses.fields(kind) if field.name not in fixed]
        return kind(**fixed, **{name: getattr(self, name) for name in names})

    def _check_mixer(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer {self.mixer!r} must be one of {', '.join(MIXERS)}")
        for mixer, keys in MIXERS.items():
            for name, default in keys.items():
                if mixer != self.mixer and getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is for mixer {mixer}, and means nothing for"
                        f" {self.mixer}: leave it at {default}"
                    )
        _ = self.mixing


@dataclasses.dataclass(frozen=True)
class RMoESeqConfig(MoEConfig):
    """A post-norm model that attends to the tokens before alone: the paper's small models.

    Attributes:
      span: how many tokens before it a token sees.
      dropout: of attention weights, of the experts' hidden activations and of their output.
    """

    span: int
    dropout: float

    def __post_init__(self):
        super().__post_init__()
        if self.span < 1:
            raise ValueError(f"span must be positive, got {self.span}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
