"""S5 word problem: four Householder steps.

python -m scanax.train.main --config configs/word_problem_s5.py --workdir runs/s5
"""

from scanax.configs import word_problem_s4


def get_config():
    config = word_problem_s4.get_config()
    config.num_steps = 4000
    config.optimizer.decay_steps = 2000
    config.model.hidden_size = 128
    config.model.num_heads = 4
    config.model.num_householder = 4
    config.model.intermediate_size = 256
    config.data.group = "S5"
    return config
