"""Rectified flow of CIFAR-10's 32 x 32 images with a U-Net of SlimFlow; FILE:SIZE chooses it.

  SCANAX_DATA=... python -m scanax.train.main --config configs/flow_cifar.py:15.7m \\
      --workdir runs/cifar

Sizes are 27.9m, 15.7m (the default), 7.0m and 3.4m, millions of parameters of DDPM++ (Zhu, Liu and
Liu 2024). For one GPU: 10,000 steps of 128 images, with a learning rate of 4e-4 and an average that
forgets soon, instead of the published 800,000.
"""

import dataclasses

from scanax.configs import base, datasets
from scanax.models import unet

SIZES = ("27.9m", "15.7m", "7.0m", "3.4m")


def get_config(size: str = "15.7m"):
    if size not in SIZES:
        raise ValueError(f"the size must be one of {', '.join(SIZES)}, not {size!r}")
    config = base.get_config("rectified_flow", "ncsnpp")
    config.num_steps = 10_000
    config.batch_size = 128

    config.model.update(dataclasses.asdict(unet.preset(f"slimflow_{size}")))
    config.model.dtype = "bfloat16"

    config.data.update(datasets.files("cifar10_jpeg.zip/train", "cifar10_jpeg.zip/test"))
    config.data.update(datasets.GENERATION)

    config.optimizer.learning_rate = 4e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.999
    config.evaluation.every_steps = 2000
    config.evaluation.batches = 16
    config.checkpoint.every_steps = 1000
    return config
