"""A small masked diffusion (RADD) on bytes of Python's manual.

python -m scanax.train.main --config configs/radd_lm_embedded.py --workdir runs/radd
python -m scanax.train.sample --workdir runs/radd --infill "The [[12]] statement [[60]]."

Expect 3.355 bits per byte (seed 0) in six minutes on two cores. What it writes is not English yet.
"""

from scanax.configs import base


def get_config():
    config = base.get_config("masked_diffusion", "radd")
    config.num_steps = 1000
    config.batch_size = 32

    config.model.hidden_size = 128
    config.model.num_hidden_layers = 4
    config.model.num_heads = 4

    config.data.length = 128
    config.data.random_offset = True

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.03
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.999

    config.evaluation.every_steps = 500
    config.evaluation.batches = 4
    config.evaluation.samples = 4
    return config
