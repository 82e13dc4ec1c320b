"""S5 word problem: four Householder steps, and more time for the shortest words.

With 300 steps on products of two, one of two seeds never got beyond them.

python -m scanax.train.main --config configs/word_problem_s5.py --workdir runs/s5
"""

from scanax.configs import word_problem_s4


def get_config():
    config = word_problem_s4.get_config()
    config.num_steps = 4500
    config.optimizer.decay_steps = 2000
    config.model.hidden_size = 128
    config.model.num_heads = 4
    config.model.num_householder = 4
    config.model.intermediate_size = 256
    config.data.group = "S5"
    config.data.curriculum_steps = (0, 600, 1000, 1200, 1400, 1600, 1800)
    return config
