"""The published U-Nets by name.

Sources: rectified flow (Liu, Gong and Liu 2022), SlimFlow (Zhu, Liu and Liu 2024), 2-RF++ (Lee, Lin
and Fanti 2024; those of EDM, Karras et al. 2022), each with the dropout it was trained with.
"""

from collections.abc import Mapping
import dataclasses

from .config import DhariwalUNetConfig, NCSNppConfig, SongUNetConfig

Config = NCSNppConfig | SongUNetConfig | DhariwalUNetConfig
_HOW = {"channels": 3, "dtype": "float32", "param_dtype": "float32", "remat": False}


def preset(name: str, **changes) -> Config:
    """A published configuration, with ``changes``: preset("slimflow_15.7m", image_size=64).

    Raises:
      ValueError: if the name is unknown; the message lists all.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def _ddpmpp(
    model_channels: int, channel_mult: tuple[int, ...], num_blocks: int, **changes
) -> NCSNppConfig:
    values = {
        "image_size": 32,
        "dropout": 0.15,
        "embedding_type": "positional",
        "fir": False,
        "progressive": "none",
        "progressive_input": "none",
        "scale_by_sigma": False,
    }
    return NCSNppConfig(
        **_HOW,
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_blocks=num_blocks,
        attn_resolutions=(16,),
        fourier_scale=16.0,
        fir_kernel=(1, 3, 3, 1),
        skip_rescale=True,
        init_scale=0.0,
        **{**values, **changes},
    )


def _song(image_size: int, channel_mult: tuple[int, ...], **changes) -> SongUNetConfig:
    """EDM's DDPM++; with ``_NCSNPP`` its NCSN++."""
    values = {
        "num_classes": 0,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "resample_filter": (1, 1),
        "dropout": 0.13,
    }
    return SongUNetConfig(
        **_HOW,
        image_size=image_size,
        model_channels=128,
        channel_mult=channel_mult,
        num_blocks=4,
        attn_resolutions=(16,),
        parameterisation="edm",
        sigma_data=0.5,
        augment_dim=9,
        channel_mult_emb=4,
        **{**values, **changes},
    )


def _adm(width: int, channel_mult: tuple[int, ...], num_blocks: int, **changes):
    return DhariwalUNetConfig(
        **_HOW,
        image_size=64,
        model_channels=width,
        channel_mult=channel_mult,
        num_blocks=num_blocks,
        sigma_data=0.5,
        num_classes=1000,
        augment_dim=0,
        channel_mult_emb=4,
        **changes,
    )


_NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
}
_EDM_ADM = {"parameterisation": "edm", "attn_resolutions": (32, 16, 8), "dropout": 0.1}
_SLIM_ADM = {"parameterisation": "velocity", "attn_resolutions": (32, 16), "dropout": 0.13}

PRESETS: Mapping[str, Config] = {
    "rf_cifar10": _ddpmpp(128, (1, 2, 2, 2), 4),
    "rf_celebahq_256": _ddpmpp(
        128,
        (1, 1, 2, 2, 2, 2, 2),
        2,
        image_size=256,
        dropout=0.0,
        embedding_type="fourier",
        fir=True,
        progressive="output_skip",
        progressive_input="input_skip",
        scale_by_sigma=True,
    ),
    "slimflow_27.9m": _ddpmpp(128, (1, 2, 2), 2),
    "slimflow_15.7m": _ddpmpp(96, (1, 2, 2), 2),
    "slimflow_7.0m": _ddpmpp(64, (1, 2, 2), 2),
    "slimflow_3.4m": _ddpmpp(64, (1, 1, 2), 1),
    "slimflow_imagenet64_80.7m": _adm(128, (1, 2, 2, 4), 2, **_SLIM_ADM),
    "slimflow_imagenet64_44.7m": _adm(128, (1, 2, 2, 2), 2, **_SLIM_ADM),
    "edm_cifar10": _song(32, (2, 2, 2)),
    "edm_cifar10_conditional": _song(32, (2, 2, 2), num_classes=10),
    "rfpp_cifar10": _song(32, (2, 2, 2), **_NCSNPP),
    "rfpp_ffhq64": _song(64, (1, 2, 2, 2), dropout=0.25, **_NCSNPP),
    "rfpp_imagenet64": _adm(192, (1, 2, 3, 4), 3, **_EDM_ADM),
}
