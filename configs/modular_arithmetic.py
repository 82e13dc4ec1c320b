"""Modular arithmetic without brackets, modulo 5: trained on 3 to 40 tokens, evaluated on 40 to 256.

python -m scanax.train.main --config configs/modular_arithmetic.py --workdir runs/arithmetic
"""

from scanax.configs import parity


def get_config():
    config = parity.get_config()
    config.num_steps = 2000
    config.batch_size = 8
    config.model.num_hidden_layers = 2
    config.model.num_heads = 4
    config.model.use_short_conv = True
    config.model.use_forget_gate = True
    config.model.use_output_gate = True
    config.model.activation = "silu"
    config.data.language = "modular_arithmetic"
    config.optimizer.learning_rate = 2e-3
    return config
