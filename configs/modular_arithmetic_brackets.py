"""Modular arithmetic with brackets, modulo 5: trained on 3 to 40 tokens, evaluated on 40 to 256.

python -m scanax.train.main --config configs/modular_arithmetic_brackets.py --workdir runs/brackets
"""

from scanax.configs import modular_arithmetic


def get_config():
    config = modular_arithmetic.get_config()
    config.data.language = "modular_arithmetic_brackets"
    return config
