"""Pictures of 32 x 32 pixels in ten classes (CIFAR-10), a convnet: features for metrics.

SCANAX_DATA=... python -m scanax.train.main --config configs/cifar_convnet.py --workdir runs/cifar

data.path and data.eval_path are folders, here in a zip, with one folder for each class.

Sized for a GPU: 51 epochs, 0.2 TFLOP a step. Not trained to the end yet; on a CPU it starts,
at 12 s
a step on half a core.
"""

from scanax.configs import base, datasets


def get_config():
    config = base.get_config("image_classification", "convnet")
    config.num_steps = 20_000
    config.batch_size = 128

    config.model.stages = (64, 128, 256)
    config.model.convs_per_stage = 3
    config.model.feature_size = 256

    config.data.update(datasets.files("cifar10_jpeg.zip/train", "cifar10_jpeg.zip/test"))
    config.data.update(datasets.SMALL_CLASSIFICATION)
    config.data.label_smoothing = 0.1

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.999

    config.evaluation.every_steps = 2000
    config.evaluation.batches = 0
    config.evaluation.batch_size = 200
    return config
