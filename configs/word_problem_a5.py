"""A5 word problem: two Householder steps suffice, because A5 is the rotations of an icosahedron.

python -m scanax.train.main --config configs/word_problem_a5.py --workdir runs/a5
"""

from scanax.configs import word_problem_s4


def get_config():
    config = word_problem_s4.get_config()
    config.data.group = "A5"
    return config
