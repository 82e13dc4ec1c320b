"""The published checkpoints of LightNet: flash-linear-attention names and configuration.

Every tensor is one parameter, at most transposed. The published model has no positions (neither
MD-TPE nor MD-LRPE). Not covered: hybrids with attention layers, and attention residuals.
"""

from collections.abc import Mapping
from typing import Any

from ..layout import Leaf, depthwise, linear, matrix, vector
from .config import LightNetLMConfig

# Keys of the published configuration that we read, with its defaults.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": None,
    "expand_ratio": 128,
    "gate_low_rank_dim": 128,
    "intermediate_size": None,
    "hidden_ratio": 4,
    "use_short_conv": False,
    "conv_size": 4,
    "elementwise_affine": True,
    "tie_word_embeddings": False,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
}
NONE_MEANS_SOMETHING = ("num_heads", "expand_ratio")

# Keys that would change the numbers, with the values under which they do not.
SUPPORTED = {
    "hidden_act": ("swish", "silu"),
    "attn": (None,),
    "attnres_block_size": (None,),
    "conv_bias": (None, False),
}


def config_from_fla(config: Mapping[str, Any], dtype: str) -> LightNetLMConfig:
    """The published configuration as ours, computing in ``dtype``.

    Keys in neither table above do not concern the numbers and are ignored.

    Raises:
      ValueError: if a key has a value that we do not support.
    """
    for name, allowed in SUPPORTED.items():
        value = config.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"config {name}={value!r} is not supported; only {allowed} are")
    fields = {}
    for name, default in DEFAULTS.items():
        value = config.get(name, default)
        fields[name] = default if value is None and name not in NONE_MEANS_SOMETHING else value
    heads, ratio = fields["num_heads"], fields.pop("expand_ratio")
    if heads is None and ratio is None:
        raise ValueError("config needs num_heads or expand_ratio")
    fields["num_heads"] = heads or fields["hidden_size"] // ratio
    fields["head_dim"] = ratio or fields["hidden_size"] // heads
    hidden_ratio = fields.pop("hidden_ratio")
    if fields["intermediate_size"] is None:
        size = int(fields["hidden_size"] * hidden_ratio * 2 / 3)
        fields["intermediate_size"] = 256 * -(-size // 256)
    return LightNetLMConfig(
        **fields,
        **_PUBLISHED,
        learn_theta=False,
        tpe_share_axes=False,
        theta_type=0,
        dtype=dtype,
        param_dtype=dtype,
        remat=False,
        implementation="auto",
    )


# What the published model is, in terms of our switches.
_PUBLISHED = {
    "mixer": "lightnet",
    "scale": 0.0,
    "output_gate": "silu",
    "tpe": "none",
    "use_lrpe": False,
    "causal": True,
}


def config_to_fla(c: LightNetLMConfig) -> dict[str, Any]:
    """Our configuration as the published one.

    Raises:
      ValueError: if the published model has no such option.
    """
    for name, value in _PUBLISHED.items():
        if getattr(c, name) != value:
            raise ValueError(
                f"the published model has model.{name}={value!r}; got {getattr(c, name)!r}"
            )
    skipped = ("expand_ratio", "hidden_ratio")
    return {
        **{name: getattr(c, name) for name in DEFAULTS if name not in skipped},
        "expand_ratio": c.key_dim,
        "model_type": "lightnet",
        "architectures": ["LightNetForCausalLM"],
        "intermediate_size": c.mlp_size,
        "hidden_act": "swish",
        "torch_dtype": c.param_dtype,
    }


def model_table(c: LightNetLMConfig) -> dict[str, Leaf]:
    """All tensors of a language model. A tied head is stored once, as the embedding."""
    table = {"model.embeddings.weight": matrix("embeddings", c.vocab_size, c.hidden_size)}
    for i in range(c.num_hidden_layers):
        table |= _block_table(c, f"model.layers.{i}", f"layers_{i}")
    table["model.norm.weight"] = vector("norm/scale", c.hidden_size)
    if not c.tie_word_embeddings:
        table["lm_head.weight"] = linear("lm_head/kernel", c.vocab_size, c.hidden_size)
    return table


def layer_table(c: LightNetLMConfig) -> dict[str, Leaf]:
    """The tensors of one token mixer, names and paths without prefix."""
    hidden, key = c.hidden_size, c.num_heads * c.key_dim
    widths = {"q": key, "k": key, "v": hidden}
    table = {
        f"{name}_proj.weight": linear(f"{name}_proj/kernel", width, hidden)
        for name, width in widths.items()
    }
    table["g_proj.0.weight"] = linear("g_proj_0/kernel", c.gate_low_rank_dim, hidden)
    table["g_proj.1.weight"] = linear("g_proj_1/kernel", hidden, c.gate_low_rank_dim)
    if c.elementwise_affine:
        table["g_norm.weight"] = vector("g_norm/scale", hidden)
    table["o_proj.weight"] = linear("o_proj/kernel", hidden, hidden)
    if c.use_short_conv:
        for name, width in widths.items():
            path = f"{name}_conv1d"
            table[f"{path}.weight"] = depthwise(f"{path}/kernel", width, c.conv_size)
    return table


def _block_table(c: LightNetLMConfig, name: str, path: str) -> dict[str, Leaf]:
    hidden, mlp = c.hidden_size, c.mlp_size
    table = {f"{name}.attn_norm.weight": vector(f"{path}/attn_norm/scale", hidden)}
    for key, leaf in layer_table(c).items():
        table[f"{name}.attn.{key}"] = Leaf(f"{path}/attn/{leaf.path}", leaf.shape, leaf.axes)
    table[f"{name}.mlp_norm.weight"] = vector(f"{path}/mlp_norm/scale", hidden)
    for part, rows, columns in (
        ("gate_proj", mlp, hidden),
        ("up_proj", mlp, hidden),
        ("down_proj", hidden, mlp),
    ):
        table[f"{name}.mlp.{part}.weight"] = linear(f"{path}/mlp/{part}/kernel", rows, columns)
    return table
