"""The published checkpoints of RADD, and those of SEDD and MDLM that are the same network.

Every tensor of RADD's is one parameter, at most transposed, but for the projection to queries, keys
and values, which is three. SEDD (Lou et al. 2024) and MDLM (Sahoo et al. 2024) scale and shift
every norm, and scale every branch, by functions of the noise level. At a fixed level these are
constants, and become part of weights that RADD has: exactly for MDLM, which is trained at level 0;
a SEDD is only at that one level what it was, which is a place to start training from.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..layout import Leaf, linear, matrix, vector
from .config import RADDConfig

# Keys of the published ``model`` configuration that we read; dropout concerns training alone.
SIZES = {"hidden_size": "hidden_size", "n_blocks": "num_hidden_layers", "n_heads": "num_heads"}
ROPE_THETA = 1e4
MDLM_PREFIX = "backbone."
BUFFERS = ("rotary_emb.inv_freq",)


def config_from_radd(config: Mapping[str, Any], dtype: str) -> RADDConfig:
    """The published configuration (``tokens`` and ``model``) as ours, computing in ``dtype``.

    Raises:
      ValueError: if a size is missing.
    """
    sizes = {**config, **config.get("model", {})}
    missing = [name for name in ("tokens", *SIZES) if name not in sizes]
    if missing:
        raise ValueError(f"config needs {', '.join(missing)}")
    return RADDConfig(
        vocab_size=sizes["tokens"] + 1,
        **{ours: sizes[theirs] for theirs, ours in SIZES.items()},
        dropout=sizes.get("dropout", 0.0),
        rope_theta=ROPE_THETA,
        dtype=dtype,
        param_dtype=dtype,
        remat=False,
    )


def config_to_radd(c: RADDConfig) -> dict[str, Any]:
    """Our configuration as the published one.

    Raises:
      ValueError: if the published model has no such option.
    """
    if c.rope_theta != ROPE_THETA:
        raise ValueError(f"the published model has model.rope_theta={ROPE_THETA:g}")
    sizes = {theirs: getattr(c, ours) for theirs, ours in SIZES.items()}
    model = {"name": "RADD", "type": "radd", **sizes, "dropout": c.dropout}
    return {"tokens": c.vocab_size - 1, "model": model}


def model_table(c: RADDConfig) -> dict[str, Leaf]:
    """All tensors, under the published names, queries, keys and values apart."""
    hidden, wide = c.hidden_size, 4 * c.hidden_size
    table = {"vocab_embed.embedding": matrix("embeddings", c.vocab_size, hidden)}
    for i in range(c.num_hidden_layers):
        name, path = f"blocks.{i}", f"layers_{i}"
        table |= _norm_table(f"{name}.norm1", f"{path}/attn_norm", hidden)
        for part in "qkv":
            table[f"{name}.attn_{part}.weight"] = linear(
                f"{path}/attn/{part}_proj/kernel", hidden, hidden
            )
        table[f"{name}.attn_out.weight"] = linear(f"{path}/attn/o_proj/kernel", hidden, hidden)
        table |= _norm_table(f"{name}.norm2", f"{path}/mlp_norm", hidden)
        table |= _dense_table(f"{name}.mlp.0", f"{path}/mlp/up_proj", wide, hidden)
        table |= _dense_table(f"{name}.mlp.2", f"{path}/mlp/down_proj", hidden, wide)
    table |= _norm_table("output_layer.norm_final", "norm", hidden)
    return table | _dense_table("output_layer.linear", "lm_head", c.vocab_size, hidden)


def read(
    tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Published tensors and configuration under the names of ``model_table``.

    Raises:
      ValueError: for a SEDD without ``sigma`` in the configuration, its noise level.
    """
    found = {name.removeprefix(MDLM_PREFIX): x for name, x in tensors.items()}
    found = {name: x for name, x in found.items() if name not in BUFFERS}
    if "sigma_map.mlp.0.weight" in found:
        mdlm = any(name.startswith(MDLM_PREFIX) for name in tensors)
        if not mdlm and "sigma" not in config:
            raise ValueError(
                "this checkpoint (SEDD) depends on the noise level and RADD does not: add the level"
                ' at which it is to be read to its config.json, for example "sigma": 0.7'
            )
        found = _fold(found, float(config.get("sigma", 0.0)))
    if "tokens" not in config and "vocab_embed.embedding" in found:
        config = {**config, "tokens": len(found["vocab_embed.embedding"]) - 1}
    parts = {}
    for name, tensor in found.items():
        if name.endswith(".attn_qkv.weight") and np.shape(tensor)[0] % 3 == 0:
            for part, x in zip("qkv", np.split(np.asarray(tensor), 3), strict=True):
                parts[name.replace("attn_qkv", f"attn_{part}")] = x
        else:
            parts[name] = tensor
    return parts, config


def write(
    tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The inverse of :func:`read`, always with RADD's names."""
    joined = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn_q.weight"):
            each = [tensors[name.replace("attn_q", f"attn_{part}")] for part in "qkv"]
            joined[name.replace("attn_q", "attn_qkv")] = np.concatenate(each)
        elif not name.endswith((".attn_k.weight", ".attn_v.weight")):
            joined[name] = tensor
    return joined, config


def _fold(tensors: Mapping[str, Any], sigma: float) -> dict[str, Any]:
    """The modulations at a noise level, as part of the norms and of the branches' last weights."""
    wide = {name: np.asarray(x).astype(np.float64) for name, x in tensors.items()}
    rate = 10_000.0 ** -(np.arange(128) / 128)
    x = np.concatenate([np.cos(sigma * rate), np.sin(sigma * rate)])
    silu = lambda x: x / (1 + np.exp(-x))
    affine = lambda name, x: wide.pop(f"{name}.weight") @ x + wide.pop(f"{name}.bias")
    x = silu(affine("sigma_map.mlp.2", silu(affine("sigma_map.mlp.0", x))))

    def norm(name: str, shift, scale):
        wide[f"{name}.bias"] = shift
        wide[f"{name}.weight"] *= 1 + scale

    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    for name in (f"blocks.{i}" for i in blocks):
        parts = np.split(affine(f"{name}.adaLN_modulation", x), 6)
        norm(f"{name}.norm1", *parts[:2])
        norm(f"{name}.norm2", *parts[3:5])
        wide[f"{name}.attn_out.weight"] *= parts[2][:, None]
        wide[f"{name}.mlp.2.weight"] *= parts[5][:, None]
        wide[f"{name}.mlp.2.bias"] *= parts[5]
    norm("output_layer.norm_final", *np.split(affine("output_layer.adaLN_modulation", x), 2))
    dtype = np.asarray(tensors["vocab_embed.embedding"]).dtype
    return {name: x.astype(dtype) for name, x in wide.items()}


def _norm_table(name: str, path: str, size: int) -> dict[str, Leaf]:
    return {
        f"{name}.weight": vector(f"{path}/scale", size),
        f"{name}.bias": vector(f"{path}/bias", size),
    }


def _dense_table(name: str, path: str, outputs: int, inputs: int) -> dict[str, Leaf]:
    return {
        f"{name}.weight": linear(f"{path}/kernel", outputs, inputs),
        f"{name}.bias": vector(f"{path}/bias", outputs),
    }
