"""The published forms of the U-Nets: names, and configurations.

``ncsnpp``: the code of rectified flow and SlimFlow, which numbers its modules. ``edm_songunet`` and
``edm_dhariwal``: EDM's code and that of 2-RF++; the configuration is the constructor's arguments,
and, ours, ``parameterisation`` ("edm" if not given) and ``sigma_data``.

What is fixed is no parameter, and is checked and made anew: the unused ``sigmas`` of NCSN++, and
the filters of EDM's networks, which a checkpoint may leave out. The random rates of the Fourier
features are kept with the parameters, and not trained.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from ..layout import Leaf, linear, matrix, vector
from .config import DhariwalUNetConfig, NCSNppConfig, SongUNetConfig
from .edm import EDMUNet
from .ncsnpp import NCSNpp

Tensors = Mapping[str, Any]
NCSNPP_KEYS = {  # ours -> theirs, and the default
    "image_size": ("image_size", 32),
    "channels": ("num_channels", 3),
    "model_channels": ("nf", 128),
    "channel_mult": ("ch_mult", (1, 2, 2, 2)),
    "num_blocks": ("num_res_blocks", 4),
    "attn_resolutions": ("attn_resolutions", (16,)),
    "dropout": ("dropout", 0.1),
    "embedding_type": ("embedding_type", "positional"),
    "fourier_scale": ("fourier_scale", 16),
    "fir": ("fir", False),
    "fir_kernel": ("fir_kernel", (1, 3, 3, 1)),
    "progressive": ("progressive", "none"),
    "progressive_input": ("progressive_input", "none"),
    "skip_rescale": ("skip_rescale", True),
    "scale_by_sigma": ("scale_by_sigma", False),
    "init_scale": ("init_scale", 0.0),
}
# Keys that would change the numbers, and the only value that we support.
NCSNPP_FIXED = {
    "resblock_type": "biggan",
    "conditional": True,
    "nonlinearity": "swish",
    "normalization": "GroupNorm",
    "progressive_combine": "sum",
    "attention_type": "ddpm",
}
SIGMAS = {"sigma_max": 50.0, "sigma_min": 0.01, "num_scales": 1000}
EDM_KEYS = {
    "image_size": ("img_resolution", None),
    "channels": ("in_channels", 3),
    "model_channels": ("model_channels", 128),
    "channel_mult": ("channel_mult", (1, 2, 2, 2)),
    "num_blocks": ("num_blocks", 4),
    "attn_resolutions": ("attn_resolutions", (16,)),
    "dropout": ("dropout", 0.1),
    "parameterisation": ("parameterisation", "edm"),
    "sigma_data": ("sigma_data", 0.5),
    "num_classes": ("label_dim", 0),
    "augment_dim": ("augment_dim", 0),
    "channel_mult_emb": ("channel_mult_emb", 4),
}
SONG_KEYS = EDM_KEYS | {
    "embedding_type": ("embedding_type", "positional"),
    "channel_mult_noise": ("channel_mult_noise", 1),
    "encoder_type": ("encoder_type", "standard"),
    "resample_filter": ("resample_filter", (1, 1)),
}
DHARIWAL_KEYS = EDM_KEYS | {
    "model_channels": ("model_channels", 192),
    "channel_mult": ("channel_mult", (1, 2, 3, 4)),
    "num_blocks": ("num_blocks", 3),
    "attn_resolutions": ("attn_resolutions", (32, 16, 8)),
}
_NCSNPP_NAMES = {
    "norm0": "GroupNorm_0",
    "conv0": "Conv_0",
    "affine": "Dense_0",
    "norm1": "GroupNorm_1",
    "conv1": "Conv_1",
    "skip": "Conv_2",
    "norm": "GroupNorm_0",
    "proj": "NIN_3",
}
_POINTWISE = ("skip", "qkv", "proj", "combine")  # our matrices that are convolutions there


def ncsnpp_config(config: Mapping[str, Any], dtype: str) -> NCSNppConfig:
    """A published configuration as ours, computing in ``dtype``.

    Raises:
      ValueError: if a key has a value that we do not support.
    """
    _check_fixed(config, NCSNPP_FIXED)
    return NCSNppConfig(**_fields(config, NCSNPP_KEYS), **_how(dtype))


def ncsnpp_public(c: NCSNppConfig) -> dict[str, Any]:
    """The inverse of :func:`ncsnpp_config`."""
    return {**_public(c, NCSNPP_KEYS), **NCSNPP_FIXED, **SIGMAS, "name": "ncsnpp"}


def ncsnpp_table(c: NCSNppConfig) -> dict[str, Leaf]:
    """All tensors that are parameters."""
    table = {}
    for path, shape in _shapes(NCSNpp, c).items():
        kind, number = path.split("/")[0].rsplit("_", 1)
        *_, module, leaf = path.split("/")
        name = f"all_modules.{number}"
        if leaf == "frequencies":
            table[f"{name}.W"] = vector(path, *shape)
        elif module == "qkv":
            table |= _three(path, name, shape)
        elif module == "proj":
            end = {"kernel": "W", "bias": "b"}[leaf]
            table[f"{name}.NIN_3.{end}"] = (matrix if leaf == "kernel" else vector)(path, *shape)
        else:
            inner = {"combine": "Conv_0", "pyramid": "Conv2d_0"}.get(kind)
            inner = inner or (_NCSNPP_NAMES[module] if path.count("/") == 2 else None)
            end, entry = _leaf(path, shape, kind if kind == "combine" else module)
            table[".".join(filter(None, (name, inner, end)))] = entry
    return table


def ncsnpp_read(tensors: Tensors, config: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Without ``sigmas``, and without the prefix of torch's DataParallel before all names."""
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    return _without(tensors, {"sigmas": _sigmas(config)}), config


def ncsnpp_write(tensors: Tensors, config: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """With ``sigmas``."""
    return {"sigmas": _sigmas(config), **tensors}, config


def song_config(config: Mapping[str, Any], dtype: str) -> SongUNetConfig:
    """The arguments of EDM's SongUNet as our configuration, computing in ``dtype``.

    Raises:
      ValueError: if one is missing, or has a value that we do not support.
    """
    _check_edm(config)
    return SongUNetConfig(**_fields(config, SONG_KEYS), **_how(dtype))


def song_public(c: SongUNetConfig) -> dict[str, Any]:
    """The inverse of :func:`song_config`."""
    return {**_public(c, SONG_KEYS), "out_channels": c.channels, "decoder_type": "standard"}


def dhariwal_config(config: Mapping[str, Any], dtype: str) -> DhariwalUNetConfig:
    """As :func:`song_config`, of DhariwalUNet."""
    _check_edm(config)
    return DhariwalUNetConfig(**_fields(config, DHARIWAL_KEYS), **_how(dtype))


def dhariwal_public(c: DhariwalUNetConfig) -> dict[str, Any]:
    """The inverse of :func:`dhariwal_config`."""
    return {**_public(c, DHARIWAL_KEYS), "out_channels": c.channels}


def edm_table(c: SongUNetConfig | DhariwalUNetConfig) -> dict[str, Leaf]:
    """All tensors that are no filters; queries, keys and values one behind the other."""
    table = {}
    for path, shape in _shapes(EDMUNet, c).items():
        if path == "map/noise/frequencies":
            table["map_noise.freqs"] = vector(path, *shape)
            continue
        *_, module, leaf = path.split("/")
        name = path.removesuffix(f"/{leaf}").replace("map/", "map_").replace("attention/", "")
        name = name.replace("enc_", "enc.", 1).replace("dec_", "dec.", 1).replace("/", ".")
        end, entry = _leaf(path, shape, module)
        table[f"{name if module != 'norm' else f'{name}2'}.{end}"] = entry
    return table


def edm_read(tensors: Tensors, config: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Without the filters, and with queries, keys and values one behind the other."""
    _check_edm(config)
    apart = {name: _regrouped(name, x, (-1, 3), (1, 0)) for name, x in tensors.items()}
    return _without(apart, _filters(config)), config


def edm_write(tensors: Tensors, config: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """With the filters, and with queries, keys and values channel by channel."""
    mixed = {name: _regrouped(name, x, (3, -1), (1, 0)) for name, x in tensors.items()}
    return {**mixed, **_filters(config)}, config


def _regrouped(name: str, x: Any, groups: tuple[int, int], order: tuple[int, int]) -> Any:
    """Rows of a tensor of queries, keys and values in another order; others as they are."""
    if ".qkv." not in name or np.shape(x)[0] % 3:
        return x
    x = np.asarray(x)
    rows = np.arange(len(x)).reshape(groups).transpose(order).ravel()
    return np.ascontiguousarray(x[rows])


def _filters(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """[1, 1, L, L] for every layer of EDM's networks that halves or doubles."""
    taps = np.asarray(config.get("resample_filter", (1, 1)), np.float32)
    value = np.outer(taps, taps)[None, None] / np.square(taps.sum())
    size, levels = config["img_resolution"], len(config.get("channel_mult", (1,) * 4))
    found = {}
    for level in range(1, levels):
        small, large = (f"{size >> i}x{size >> i}" for i in (level, level - 1))
        for block in (f"enc.{small}_down", f"dec.{large}_up"):
            found |= {f"{block}.{conv}.resample_filter": value for conv in ("conv0", "skip")}
        if config.get("encoder_type") == "residual":
            found[f"enc.{small}_aux_residual.resample_filter"] = value
    return found


def _sigmas(config: Mapping[str, Any]) -> np.ndarray:
    largest, least, number = (config.get(name, default) for name, default in SIGMAS.items())
    return np.exp(np.linspace(np.log(largest), np.log(least), number))


def _without(tensors: Tensors, fixed: Tensors) -> dict[str, Any]:
    """Without what is fixed; a ValueError if that is not as it should be."""
    for name, value in fixed.items():
        if name in tensors:
            given = np.asarray(tensors[name], np.float64)
            if given.shape != value.shape or not np.allclose(given, value, 1e-3, 1e-6):
                raise ValueError(f"tensor {name} is not what the config says: it is fixed, and not")
    return {name: x for name, x in tensors.items() if name not in fixed}


def _three(path: str, name: str, shape: tuple[int, ...]) -> dict[str, Leaf]:
    """The published queries, keys and values of one parameter [C, 3 C] or [3 C]."""
    size, table = shape[-1] // 3, {}
    for i in range(3):
        at = slice(i * size, (i + 1) * size)
        if len(shape) == 2:
            leaf = Leaf(path, (size, size), (0, 1), (slice(0, size), at))
        else:
            leaf = Leaf(path, (size,), (0,), (at,))
        table[f"{name}.NIN_{i}.{'W' if len(shape) == 2 else 'b'}"] = leaf
    return table


def _leaf(path: str, shape: tuple[int, ...], module: str) -> tuple[str, Leaf]:
    """ "weight" or "bias", and how that tensor lies in ours."""
    if len(shape) == 1:
        return "bias" if path.endswith("/bias") else "weight", vector(path, *shape)
    if len(shape) == 4:
        height, width, columns, rows = shape
        return "weight", Leaf(path, (rows, columns, height, width), (2, 3, 1, 0))
    if module in _POINTWISE:
        return "weight", Leaf(path, (*shape[::-1], 1, 1), (1, 0))
    return "weight", linear(path, *shape[::-1])


@functools.lru_cache(maxsize=8)
def _shapes(kind: Any, c: Any) -> Mapping[str, tuple[int, ...]]:
    """Of the parameters by path; nothing is computed."""
    x = jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    tree = nn.meta.unbox(jax.eval_shape(kind(c).init, jax.random.key(0), x, t)["params"])
    flat: Any = traverse.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _fields(config: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    fields = {ours: config.get(theirs, default) for ours, (theirs, default) in keys.items()}
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in fields.items()}


def _public(c: Any, keys: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    listed = lambda value: [*value] if isinstance(value, tuple) else value
    return {theirs: listed(getattr(c, ours)) for ours, (theirs, _) in keys.items()}


def _how(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "param_dtype": dtype, "remat": False}


def _check_edm(config: Mapping[str, Any]) -> None:
    if "img_resolution" not in config:
        raise ValueError("config lacks img_resolution")
    _check_fixed(config, {"decoder_type": "standard", "out_channels": config.get("in_channels", 3)})


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"config {name}={config[name]!r} is not supported; only {value!r} is")
