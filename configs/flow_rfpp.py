"""2-RF++ (Lee, Lin and Fanti 2024): one more flow on the pairs of a diffusion model; FILE:DATA.

With EDM's checkpoint as a folder of config.json and .safetensors, and LPIPS weights of yours:

  F="--config configs/flow_rfpp.py:cifar10 --config.objective.distance=piq:WEIGHTS.npz"
  python -m scanax.models.interop --from EDM --to runs/edm $F
  python -m scanax.train.generate_pairs --workdir runs/edm --out pairs/edm --num 1000000 \\
      --recipe edm_heun:18
  python -m scanax.train.main $F --workdir runs/rfpp \\
      --config.init_from=runs/edm --config.data.pairs=pairs/edm

DATA is cifar10, ffhq64 or imagenet64 (the images that samples are compared with: data.source; the
last two as ``scanax.train.data.prepare images`` leaves them, with a --eval_path for the split named
validation). Pairs of cifar10 are read into memory, 25 GB for 1,000,000; the others' are read from
disk when needed. The published schedules: 800,000 steps of 512, 1,000,000 of 256, 700,000 of 2,048.
Not trained here.
"""

import dataclasses

from scanax.configs import base, datasets
from scanax.models import unet

# preset, learning rate, warm-up, batch, steps, loss
RECIPES = {
    "cifar10": ("rfpp_cifar10", 2e-4, 5000, 512, 800_000, "lpips_huber_divt"),
    "ffhq64": ("rfpp_ffhq64", 2e-4, 5000, 256, 1_000_000, "lpips_huber"),
    "imagenet64": ("rfpp_imagenet64", 1e-4, 2500, 2048, 700_000, "lpips_huber"),
}


def get_config(data: str = "cifar10"):
    if data not in RECIPES:
        raise ValueError(f"the data must be one of {', '.join(RECIPES)}, not {data!r}")
    preset, rate, warmup, batch, steps, loss = RECIPES[data]
    family = "edm_dhariwal" if data == "imagenet64" else "edm_songunet"
    config = base.get_config("rectified_flow", family)
    config.model.update(dataclasses.asdict(unet.preset(preset)))
    config.num_steps = steps
    config.batch_size = batch
    config.microbatches = 4 if data == "imagenet64" else 1

    if data == "cifar10":
        config.data.update(datasets.files("cifar10_jpeg.zip/train", "cifar10_jpeg.zip/test"))
    else:
        config.data.update(datasets.tfds(data, "prepared", eval_split="validation"))
    config.data.in_memory = data == "cifar10"
    if data == "ffhq64":
        config.data.label_key = ""  # faces have no classes

    config.objective.loss = loss
    config.objective.times = "u_shaped"
    config.objective.distance = "random_conv"  # a stand-in until you name yours
    config.objective.distance_size = "224"

    config.optimizer.learning_rate = rate
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = warmup
    config.optimizer.ema_decay = 0.9999
    config.optimizer.ema_start = "constant"
    config.sampler.recipe = "rfpp_new_euler:1"
    config.sampler.invert = "rfpp_invert_euler:4"
    config.sampler.recipes = ("rfpp_new_euler:1", "rfpp_new_euler:2", "rfpp_heun:5")
    config.checkpoint.every_steps = 5000
    return config
