"""Handwritten digits of 8 x 8 pixels, LightNet on 4 x 4 patches of 2 x 2: runs anywhere.

python -m scanax.train.main --config configs/lightnet_digits.py --workdir runs/digits

Expect 96.4 % of the 221 held-out digits, the mean of three seeds, in one to two minutes.

Its positions and its mixer, one after the other (see configs/README.md):

  python -m scanax.train.sweep --config configs/lightnet_digits.py --workdir runs/digits_sweep \\
      --grid "model.tpe=bidirectional,none" --grid "model.use_lrpe=true,false" --seeds 3
  python -m scanax.train.sweep --config configs/lightnet_digits.py --workdir runs/digits_mixers \\
      --grid "model.mixer=gla_two_scans,softmax" --seeds 3
"""

from scanax.configs import base


def get_config():
    config = base.get_config("image_classification", "lightnet")
    config.num_steps = 1000
    config.batch_size = 64

    config.model.hidden_size = 64
    config.model.num_hidden_layers = 4
    config.model.num_heads = 4
    config.model.intermediate_size = 128
    config.model.patch_size = (2, 2)
    config.model.drop_path = 0.1

    config.data.channels = 1
    config.data.crop_padding = 1

    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.2
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.99

    config.evaluation.batches = 0
    return config
