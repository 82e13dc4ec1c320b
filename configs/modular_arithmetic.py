"""Modular arithmetic without brackets, modulo 5: trained on 3 to 40 tokens, evaluated on 40 to 256.

Longer words come step by step: with all lengths from the start it was at chance after 350 steps.

python -m scanax.train.main --config configs/modular_arithmetic.py --workdir runs/arithmetic
"""

from scanax.configs import parity


def get_config():
    config = parity.get_config()
    config.num_steps = 4000
    config.batch_size = 8
    config.model.num_hidden_layers = 2
    config.model.num_heads = 4
    config.model.use_short_conv = True
    config.model.use_forget_gate = True
    config.model.use_output_gate = True
    config.model.activation = "silu"
    config.data.language = "modular_arithmetic"
    config.data.curriculum_lengths = (3, 5, 7, 9, 15, 25, 39)
    config.data.curriculum_steps = (0, 200, 400, 600, 800, 1000, 1200)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_steps = 1500
    config.optimizer.final_fraction = 0.1
    config.evaluation.stop_when = "scaled_accuracy>=0.99"
    return config
