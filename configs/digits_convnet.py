"""Handwritten digits of 8 x 8 pixels, a small convnet: features for metrics, in a minute.

python -m scanax.train.main --config configs/digits_convnet.py --workdir runs/digits_convnet

Expect 99.1 % of the 221 held-out digits, seed 0, after 20 seconds of one core's time.
"""

from scanax.configs import base


def get_config():
    config = base.get_config("image_classification", "convnet")
    config.num_steps = 1000
    config.batch_size = 64

    config.data.channels = 1
    config.data.crop_padding = 1

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.optimizer.ema_decay = 0.99

    config.evaluation.batches = 0
    return config
