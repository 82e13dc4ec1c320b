"""LightNet in three dimensions: where does the digit move? 4 x 4 x 4 tokens of 1 x 4 x 4 pixels.

python -m scanax.train.main --config configs/lightnet_moving_digits.py --workdir runs/moving

A digit moves in one of eight directions through four frames of 16 x 16; what leaves on one side
comes back on the other. The frames without their order do not tell the direction, and neither do
patches without their places: the answer is in the positions. The paper has no such experiment.
Expect 97.5 % of 2,048 clips in nine minutes on one core.

Without positions (--config.model.tpe=none --config.model.use_lrpe=false) expect 29.1 %.
"""

from scanax.configs import lightnet_digits


def get_config():
    config = lightnet_digits.get_config()
    config.num_steps = 1500
    config.model.patch_size = (1, 4, 4)
    config.data.source = "moving_digits"
    config.data.crop_padding = 0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.model.drop_path = 0.0
    config.evaluation.batches = 32
    return config
