"""The published checkpoints of DeltaProduct: flash-linear-attention names and configuration.

Rows of the k, v and b projections are ordered (n, h, d), Householder step outermost, which
is our order too: every tensor is one parameter, at most transposed. The paper's own
repository of 2025 keeps a tensor per step (``k_projs.0``, ``k_projs.1``, ...), which ``join_steps``
and ``split_steps`` translate. Not covered: hybrids with attention layers.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

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
    "use_gate": (None,),  # the 2025 repository's name of use_output_gate: another naming
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


def config_to_fla(c: DeltaProductConfig) -> dict[str, Any]:
    """Our configuration as the published one.

    Raises:
      ValueError: if the published model has no such option.
    """
    if c.activation != "silu" or c.value_heads != c.num_heads:
        raise ValueError(
            f"the published model has activation silu and as many value heads as heads; got"
            f" {c.activation}, {c.value_heads} and {c.num_heads}"
        )
    shared = {name: getattr(c, name) for name in DEFAULTS if hasattr(c, name)}
    del shared["num_v_heads"]
    return {
        **shared,
        "model_type": "gated_deltaproduct",
        "architectures": ["GatedDeltaProductForCausalLM"],
        "intermediate_size": c.mlp_size,
        "hidden_act": "swish",
        "torch_dtype": c.param_dtype,
    }


# Tensors with one entry per step in the 2025 repository, and whether the model uses them all.
_PER_STEP = {"k_proj": True, "v_proj": True, "b_proj": True}
_PER_STEP |= {"k_conv1d": True, "v_conv1d": True, "q_conv1d": False}


def join_steps(
    tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and configuration of the 2025 repository, under the present names.

    ``q_conv1ds`` beyond the first are parameters that its model never uses; they are dropped.

    Raises:
      ValueError: if a step's tensor is missing.
    """
    gate = config.get("use_gate", config.get("use_output_gate", True))
    config = {**config, "use_output_gate": gate}
    config.pop("use_gate", None)
    steps = config.get("num_householder") or DEFAULTS["num_householder"]
    joined, parts = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.)(\w+)s\.(\d+)\.weight", name)
        if found and found[2] in _PER_STEP:
            parts.setdefault((found[1], found[2]), {})[int(found[3])] = np.asarray(tensor)
        else:
            joined[name] = tensor
    for (prefix, kind), by_step in parts.items():
        needed = range(steps) if _PER_STEP[kind] else range(1)
        missing = [f"{prefix}{kind}s.{j}.weight" for j in needed if j not in by_step]
        extra = [f"{prefix}{kind}s.{j}.weight" for j in by_step if j >= steps]
        if missing or extra:
            raise ValueError(
                f"config num_householder={steps}, but tensor"
                f" {'missing' if missing else 'not expected'}: {', '.join(missing or extra)}"
            )
        joined[f"{prefix}{kind}.weight"] = np.concatenate([by_step[j] for j in needed])
    return joined, config


def split_steps(
    tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of :func:`join_steps`; unused ``q_conv1ds`` are copies of the first."""
    steps = config.get("num_householder") or DEFAULTS["num_householder"]
    split = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind not in _PER_STEP:
            split[name] = tensor
            continue
        parts = np.split(tensor, steps) if _PER_STEP[kind] else [tensor] * steps
        for j, part in enumerate(parts):
            split[f"{prefix}.{kind}s.{j}.weight"] = np.ascontiguousarray(part)
    config = dict(config)
    if "use_output_gate" in config:
        config["use_gate"] = config.pop("use_output_gate")
    return split, config


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
