"""LightNet on ImageNet-1k in the shapes of DeiT: SIZE is tiny, small or base.

  python -m scanax.train.main --config configs/lightnet_imagenet.py:small --workdir runs/small \\
      --config.data.data_dir=data

Reads TFDS's imagenet2012 (prepared with TFDS; it has to be downloaded by hand). 224 x 224 pixels
in 14 x 14 patches, trained as DeiT (Touvron et al. 2021): 300 epochs of AdamW, 5 of them warmup,
mixup, cutmix, random augmentation and erasing, label smoothing, stochastic depth, and an average
of the parameters for evaluation. The paper's own sizes could not be read.

Not trained here: the parameter counts are checked, no result is claimed.
"""

from scanax.configs import base, datasets

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # hidden size, heads
IMAGES = 1_281_167


def get_config(size: str = "tiny"):
    """Args: size: a key of SIZES."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} must be one of {', '.join(SIZES)}")
    config = base.get_config("image_classification", "lightnet")
    config.batch_size = 1024
    config.num_steps = 300 * IMAGES // config.batch_size

    config.model.hidden_size, config.model.num_heads = SIZES[size]
    config.model.num_hidden_layers = 12
    config.model.gate_low_rank_dim = 64
    config.model.patch_size = (16, 16)
    config.model.drop_path = 0.1
    config.model.dtype = "bfloat16"

    config.data.update(datasets.tfds("imagenet2012", "", "train", "validation"))
    config.data.update(datasets.CLASSIFICATION)
    config.data.image_size = 224
    config.data.in_memory = False
    config.data.threads = 16

    config.optimizer.learning_rate = 1e-3  # 5e-4 for 512 images
    config.optimizer.warmup_steps = 5 * IMAGES // config.batch_size
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.99996

    config.evaluation.every_steps = 10_000
    config.evaluation.batches = 0
    config.evaluation.batch_size = 500
    config.checkpoint.every_steps = 2000
    return config
