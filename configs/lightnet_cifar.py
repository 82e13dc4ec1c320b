"""LightNet on pictures of 32 x 32 pixels in ten classes (CIFAR-10), 8 x 8 patches of 4 x 4.

SCANAX_DATA=... python -m scanax.train.main --config configs/lightnet_cifar.py --workdir runs/cifar

data.path and data.eval_path are folders, here in a zip, with one folder for each class.

Expect 48.5 % of the test images, seed 0, in 19 minutes on one core; 46.2 % without positions
(--config.model.tpe=none --config.model.use_lrpe=false).
"""

from scanax.configs import datasets, lightnet_digits


def get_config():
    config = lightnet_digits.get_config()
    config.num_steps = 2000
    config.batch_size = 64
    config.model.hidden_size = 96
    config.model.intermediate_size = 256
    config.model.patch_size = (4, 4)
    config.data.update(datasets.files("cifar10_jpeg.zip/train", "cifar10_jpeg.zip/test"))
    config.data.update(datasets.SMALL_CLASSIFICATION)
    config.data.channels = 3
    config.optimizer.ema_decay = 0.999
    config.optimizer.warmup_steps = 200
    config.evaluation.batch_size = 200
    return config
