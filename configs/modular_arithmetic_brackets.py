"""Modular arithmetic with brackets, modulo 5: trained on 3 to 40 tokens, evaluated on 40 to 256.

python -m scanax.train.main --config configs/modular_arithmetic_brackets.py --workdir runs/brackets
"""

from scanax.configs import modular_arithmetic


def get_config():
    config = modular_arithmetic.get_config()
    config.data.language = "modular_arithmetic_brackets"
    config.data.curriculum_lengths = (3, 5, 7, 9, 15, 25, 40)
    config.data.curriculum_steps = (0, 200, 400, 700, 1000, 1300, 1600)
    return config
