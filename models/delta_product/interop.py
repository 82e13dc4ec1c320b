"""The published checkpoints of DeltaProduct: flash-linear-attention names and configuration.

Rows of the k, v and b projections are ordered (n, h, d), Householder step outermost, which
is our order too: every tensor is one parameter, at most transposed. Not covered: the layout
of the paper's first repository (``k_projs.0`` ...), hybrids with attention layers.
"""

from collections.abc import Mapping
from typing import Any

from ..layout import Leaf, depthwise, linear, matrix, vector
from .config import DeltaProductConfig

# Keys of the published configuration that we read, with its defaults.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 21,
    "num_heads": 6,
    "num_v_heads": None,  # of the layer only; the published model has no such key
    "head_dim": 256,
    "expand_v": 2.0,
    "num_householder": 1,
    "intermediate_size": None,
    "hidden_ratio": 4,
    "use_short_conv": True,
    "conv_size": 4,
    "use_forget_gate": False,
    "use_output_gate": True,
    "allow_neg_eigval": False,
    "tie_word_embeddings": False,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
}

# Keys that would change the numbers, with the values under which they do not.
SUPPORTED = {
    "hidden_act": ("swish", "silu"),
    "attn": (None,),
    "attnres_block_size": (None,),
    "elementwise_affine": (None, True),
    "conv_bias": (None, False),
    "use_gate": (None,),  # the first repository's name of use_output_gate: another layout
}


def config_from_fla(config: Mapping[str, Any], dtype: str) -> DeltaProductConfig:
    """The published configuration as ours, computing in ``dtype``.

    Keys in neither table above do not concern the numbers (``model_type``, ``use_cache``,
    ``fuse_cross_entropy``, ...) and are ignored.

    Raises:
      ValueError: if a key has a value that we do not support.
    """
    for name, allowed in SUPPORTED.items():
        value = config.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"config {name}={value!r} is not supported; only {allowed} are")
    fields = dict(DEFAULTS)
    fields |= {name: config[name] for name in DEFAULTS if config.get(name) is not None}
    hidden_ratio = fields.pop("hidden_ratio")
    if fields["intermediate_size"] is None:
        size = int(fields["hidden_size"] * hidden_ratio * 2 / 3)
        fields["intermediate_size"] = 256 * -(-size // 256)
    fields["num_v_heads"] = fields["num_v_heads"] or 0
    ours = {"activation": "silu", "remat": False, "implementation": "auto"}
    return DeltaProductConfig(**fields, **ours, dtype=dtype, param_dtype=dtype)


def model_table(c: DeltaProductConfig) -> dict[str, Leaf]:
    """All tensors of a language model. A tied head is stored once, as the embedding."""
    table = {"model.embeddings.weight": matrix("embeddings", c.vocab_size, c.hidden_size)}
    for i in range(c.num_hidden_layers):
        table |= _block_table(c, f"model.layers.{i}", f"layers_{i}")
    table["model.norm.weight"] = vector("norm/scale", c.hidden_size)
    if not c.tie_word_embeddings:
        table["lm_head.weight"] = linear("lm_head/kernel", c.vocab_size, c.hidden_size)
    return table


def layer_table(c: DeltaProductConfig) -> dict[str, Leaf]:
    """The tensors of one token mixer, names and paths without prefix."""
    key, value = c.num_heads * c.head_dim, c.value_heads * c.value_dim
    width = {"q": key, "k": c.num_householder * key, "v": c.num_householder * value}
    features = {f"{name}_proj": size for name, size in width.items()}
    features["b_proj"] = c.num_householder * c.value_heads
    table = {}
    if c.use_forget_gate:
        features["a_proj"] = c.value_heads
        table |= {name: vector(name, c.value_heads) for name in ("A_log", "dt_bias")}
    if c.use_output_gate:
        features["g_proj"] = value
    for name, size in features.items():
        table[f"{name}.weight"] = linear(f"{name}/kernel", size, c.hidden_size)
    if c.use_short_conv:
        for name, size in width.items():
            path = f"{name}_conv1d"
            table[f"{path}.weight"] = depthwise(f"{path}/kernel", size, c.conv_size)
    table["o_norm.weight"] = vector("o_norm/scale", c.value_dim)
    table["o_proj.weight"] = linear("o_proj/kernel", c.hidden_size, value)
    return table


def _block_table(c: DeltaProductConfig, name: str, path: str) -> dict[str, Leaf]:
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
