"""Parity of random bits: trained on 3 to 40 of them, evaluated on 40 to 256.

python -m scanax.train.main --config configs/parity.py --workdir runs/parity
"""

from scanax.configs import base


def get_config():
    config = base.get_config("formal_language")
    config.num_steps = 1000
    config.batch_size = 16

    config.model.hidden_size = 64
    config.model.num_heads = 2
    config.model.head_dim = 16
    config.model.num_householder = 2
    config.model.intermediate_size = 128
    config.model.use_short_conv = False
    config.model.use_output_gate = False
    config.model.activation = "identity"

    config.data.language = "parity"

    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.995

    config.evaluation.every_steps = 100
    config.evaluation.stop_when = "scaled_accuracy>=0.999"
    config.checkpoint.every_steps = 500
    return config
